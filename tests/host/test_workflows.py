"""The example workflows, as far as they can run with the small model; all of them in the API."""

import json
import re
import time
import urllib.parse
from pathlib import Path

import pytest
from PIL import Image

from ..harness.server import PromptError
from ..harness.workflows import TRAIN, USE, load_workflow, node_titled

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
NOT_FOR_THE_SMALL_MODEL = {"7 With a LoRA and a ControlNet"}
RESUME, COMPARE = "3 Stop and go on", "4 Compare checkpoints and strengths"
KEEP = "10 Keep what the model knows"
ANALYZE, MERGE = "5 Look at the small weights", "6 Two styles in one"


def short(prompt, **train):
    """Make few steps of everything."""
    for node in prompt.values():
        if node["class_type"] == "SaraTrain":
            node["inputs"].update({"steps": 4, "batch_size": 2, "save_every_steps": 2, **train})
        if node["class_type"] in ("KSampler", "SaraSampling"):
            node["inputs"]["steps"] = 1
    return prompt


@pytest.fixture(scope="module")
def trained(server):
    """The first workflow's outputs, and the names of its run and its delta."""
    prompt = short(load_workflow(server, TRAIN))
    outputs = server.run(prompt)
    text = outputs[node_titled(prompt, "SaRA Train")]["text"][0]
    name = re.search(r"saved (\S+),", text)[1]
    return outputs, name.partition("/")[0], name


def pictures(outputs):
    return [image for output in outputs.values() for image in output.get("images", [])]


def test_the_first_training_trains_and_draws(trained, server):
    outputs, run, _ = trained
    assert len(pictures(outputs)) == 2  # contact sheet, before and after
    folder = server.base / "output" / "sara" / run
    found = sorted(path.name for path in (folder / "previews").iterdir())
    assert found == ["preview_0000000_steps.png", "preview_0000004_steps.png"]
    assert Image.open(folder / "previews" / found[0]).size == (4 * 64 + 3 * 4, 64)


@pytest.mark.parametrize("name", [USE, MERGE])
def test_deltas_are_used(trained, server, name):
    prompt = short(load_workflow(server, name))
    for node in prompt.values():
        if node["class_type"] == "SaraLoadDelta":
            node["inputs"]["delta_name"] = trained[2]
    assert len(pictures(server.run(prompt))) == 4
    if name == MERGE:
        assert list((server.base / "output" / "sara").glob("merged_*_.safetensors"))


def test_the_small_weights_are_looked_at_and_zeroed(server):
    outputs = server.run(short(load_workflow(server, ANALYZE)))
    assert len(pictures(outputs)) == 4 + 4
    assert any("sara_analysis" in output for output in outputs.values())


def test_the_model_makes_pictures_of_what_is_kept(server):
    prompt = short(load_workflow(server, KEEP))
    outputs = server.run(prompt)
    (chart,) = outputs[node_titled(prompt, "SaRA Train")]["sara_training"]
    folder = server.base / "output" / "sara" / chart["run"]
    text = (folder / "log.txt").read_text()
    assert (
        "choosing the weights by what they learn, beside what the regularisation pictures" in text
    )
    assert "the 10 % that learn most" in text
    assert len((folder / "loss.csv").read_text().splitlines()) == 1 + 4
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["select_by"], settings["regularisation_weight"]) == ("gradient", 1.0)


def test_checkpoints_are_compared(trained, server):
    prompt = short(load_workflow(server, COMPARE))
    prompt[node_titled(prompt, "Load SaRA Checkpoints")]["inputs"]["run"] = trained[1]
    outputs = server.run(prompt)
    (sheet,) = outputs[node_titled(prompt, "SaRA Compare")]["images"]
    picture = server.picture(sheet)
    (server.base / "sheet.png").write_bytes(picture)
    width, height = Image.open(server.base / "sheet.png").size
    row = 4 * 64 + 3 * 4
    # Four strengths; of the two checkpoints kept one is of the same step as the final delta.
    assert width == 4 * row + 5 * 8
    assert height == 22 + 2 * (22 + 64 + 8)


def test_a_cancelled_run_is_resumed(server):
    prompt = short(
        load_workflow(server, RESUME), steps=2000, save_every_steps=0, output_name="long"
    )
    train = node_titled(prompt, "SaRA Train")
    before = {path.name for path in (server.base / "output" / "sara").glob("long_*")}
    queued = server.submit(prompt)
    folder = None
    while folder is None or not (folder / "loss.csv").is_file():
        time.sleep(0.05)
        new = [p for p in (server.base / "output" / "sara").glob("long_*") if p.name not in before]
        folder = new[0] if new else None
        assert server.process.poll() is None
    while len((folder / "loss.csv").read_text().splitlines()) < 4:
        time.sleep(0.05)
    server.post("/interrupt", {})
    with pytest.raises(PromptError):
        server.wait(queued)
    settings = json.loads((folder / "settings.json").read_text())
    made = len((folder / "loss.csv").read_text().splitlines()) - 1
    settings["steps"] = made + 3  # its own settings are used; two thousand are too many here
    (folder / "settings.json").write_text(json.dumps(settings))
    prompt[train]["inputs"]["resume"] = folder.name
    outputs = server.run(prompt)
    assert f"saved {folder.name}/long_{made + 3}_steps" in outputs[train]["text"][0]
    assert len((folder / "loss.csv").read_text().splitlines()) == 1 + made + 3


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_is_in_order(server, name):
    saved = json.loads((WORKFLOWS / f"{name}.json").read_text())
    info = server.get("/object_info")
    nodes = {node["id"]: node for node in saved["nodes"]}
    assert saved["last_node_id"] == max(nodes)
    for node in saved["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        known = info[node["type"]]
        ours = node["type"].startswith("Sara")
        assert node["properties"]["cnr_id"] == ("sara-finetune" if ours else "comfy-core")
        names = [output["name"] for output in node["outputs"]]
        assert names == known["output_name"][: len(names)]  # newer versions add some
        assert not ours or len(names) == len(known["output_name"])
        for model in node["properties"].get("models", []):
            assert model["url"].endswith(model["name"])
            assert model["name"].endswith(".safetensors")
    for number, source, output, target, entry, kind in saved["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][entry]["link"] == number
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][entry]["type"] == kind


def test_the_template_menu_offers_them_with_pictures(server):
    assert set(server.get("/workflow_templates")["ComfyUI-SaRA"]) == set(NAMES)
    for name in NAMES:
        quoted = urllib.parse.quote(name)
        served = server.get(f"/api/workflow_templates/ComfyUI-SaRA/{quoted}.json")
        assert served == json.loads((WORKFLOWS / f"{name}.json").read_text())
        picture = WORKFLOWS / f"{name}.jpg"
        assert Image.open(picture).format == "JPEG"
        assert server.get(f"/api/workflow_templates/ComfyUI-SaRA/{quoted}.jpg", raw=True)
        assert picture.stat().st_size < 100_000
