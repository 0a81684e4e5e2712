"""What people see, in a real browser, in both renderers."""

import itertools
import json
import math
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from ..harness.workflows import TRAIN, USE, api_form
from .browser import Page, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs chromium and chromedriver")

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"
NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
SEEDS = itertools.count(1)


@pytest.fixture(scope="module", params=["classic", "vue"])
def page(request, server):
    opened = Page(server, request.param)
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def no_errors_of_ours(page):
    page.errors()
    yield
    assert page.errors() == []


def idle(page):
    """Wait until nothing runs any more."""
    page.wait("return true")
    deadline = time.time() + 120
    while time.time() < deadline:
        queue = page.server.get("/queue")
        if not queue["queue_running"] and not queue["queue_pending"]:
            return
        time.sleep(0.2)
    raise AssertionError("the queue is not done")


def first_training(page, **train):
    """Set up the first example for a run of its own: what the server has done before comes from its cache."""
    page.drop(WORKFLOWS / f"{TRAIN}.json")
    page.set_for_the_small_model()
    page.set_widgets("SaraTrain", **{"steps": 6, "batch_size": 2, "seed": next(SEEDS), **train})
    page.set_widgets("SaraSampling", steps=1)
    page.set_widgets("SaraCompare", strengths="1")


@pytest.mark.parametrize("name", NAMES)
def test_every_example_loads_whole(page, name):
    page.drop(WORKFLOWS / f"{name}.json")
    missing = page.js(
        "return window.app.graph.nodes.map((n) => n.type)"
        ".filter((type) => !LiteGraph.registered_node_types[type])"
    )
    assert missing == []
    saved = json.loads((WORKFLOWS / f"{name}.json").read_text())
    expected = api_form(saved, page.server.get("/object_info"))
    sent = page.later("return (await window.app.graphToPrompt()).output")
    assert sent.keys() == expected.keys()
    for number, node in expected.items():
        found = {k: v for k, v in sent[number]["inputs"].items() if k in node["inputs"]}
        assert found == node["inputs"], node["class_type"]
        extra = sent[number]["inputs"].keys() - node["inputs"].keys()
        assert extra <= {"upload", "image"}, (node["class_type"], extra)
    serialised = page.js("return window.app.graph.serialize().nodes")
    for node in serialised:
        if node["type"].startswith("Sara"):
            (before,) = [n for n in saved["nodes"] if n["id"] == node["id"]]
            assert node["widgets_values"] == before["widgets_values"]
            assert node["properties"]["sara_widgets"] == before["properties"]["sara_widgets"]


def test_a_workflow_of_an_earlier_version_keeps_its_values(page, tmp_path):
    old = json.loads((Path(__file__).parent / "first_training_0.1.0.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps(old))
    page.drop(tmp_path / "old.json")
    expected = {
        "threshold": 0.0, "fraction": 0.1, "steps": 300, "batch_size": 8, "lr_schedule": "cosine",
        "progressive": 0.5, "low_rank_weight": 0.0005, "loss_function": "mse",
        "gradient_checkpointing": False, "training_dtype": "auto", "save_dtype": "fp16",
        "output_name": "fluent3d", "save_every_steps": 100, "keep_checkpoints": 2,
        "resume": "new run", "zeros": "auto", "validate_every_steps": 50, "moments": "fp32",
        "preview_strength": 1.0, "more_steps": 0, "select_from": "model",
    }  # fmt: skip
    for name, value in expected.items():
        assert page.widget("SaraTrain", name) == value, name
    assert page.widget("SaraImageFolder", "size") == 64
    linked = """const { output } = await window.app.graphToPrompt();
        return Object.values(output).find((n) => n.class_type === "SaraSampling").inputs.latent[0];"""
    assert page.later(linked) == "8"
    assert page.widget("SaraAnalyze", "fraction") == 0.1
    # Its threshold comes from SaRA Analyze, so the fraction beside it is visibly off, and what it is of.
    off = """const { widgets } = window.app.graph.nodes.find((n) => n.type === "SaraTrain");
        return arguments[0].map((name) => widgets.find((w) => w.name === name).disabled);"""
    ways = ["fraction", "select_from", "select_by", "threshold", "progressive", "zeros"]
    assert page.js(off, ways) == [True, True, True, False, False, False]
    page.js(
        """const node = window.app.graph.nodes.find((n) => n.type === "SaraTrain");
        node.disconnectInput(node.inputs.findIndex((i) => i.name === "threshold"));"""
    )
    assert page.js(off, ways) == [False] * 6
    # Where the gradient says it, what goes by size is off.
    page.set_widgets("SaraTrain", select_by="gradient")
    assert page.js(off, ways) == [False, True, False, True, True, True]


def test_few_widgets_are_shown_and_the_rest_on_demand(page):
    page.drop(WORKFLOWS / f"{TRAIN}.json")
    shown = """const node = window.app.graph.nodes.find((n) => n.type === arguments[0]);
        const all = node.widgets.filter((w) => w.serialize !== false);
        const isFolded = (w) => w.hidden || (native() && w.options?.advanced);
        function native() { return node.widgets.find((w) => w.type === "button").hidden; }
        return [all.filter((w) => !isFolded(w)).map((w) => w.name), all.length, node.size[1]];"""
    for kind, most in (("SaraTrain", 10), ("SaraImageFolder", 7)):
        names, total, _ = page.js(shown, kind)
        assert len(names) <= most, names
        assert total > 14
    _, _, short = page.js(shown, "SaraTrain")
    button = "window.app.graph.nodes.find((n) => n.type === 'SaraTrain').widgets.find((w) => w.type === 'button')"
    if not page.js(f"return {button}.hidden"):  # newer frontends have one of their own in Vue nodes
        page.js(f"{button}.callback()")
        names, total, tall = page.js(shown, "SaraTrain")
        assert len(names) == total
        assert tall > short + 300
        page.js(f"{button}.callback()")
        assert page.js(shown, "SaraTrain")[2] == short


def test_a_node_keeps_the_height_that_was_given_to_it(page):
    page.drop(WORKFLOWS / f"{TRAIN}.json")
    height = "return window.app.graph.nodes.find((n) => n.type === 'SaraTrain').size[1]"
    page.js(
        """const node = window.app.graph.nodes.find((n) => n.type === "SaraTrain");
        node.setSize([node.size[0], node.size[1] + 333]);"""
    )
    given = page.js(height)
    page.reopen()
    assert page.js(height) == pytest.approx(given, abs=30)


def test_loading_makes_no_node_taller(page):
    page.drop(WORKFLOWS / f"{TRAIN}.json")
    of_folder = "window.app.graph.nodes.find((n) => n.type === 'SaraImageFolder')"
    button = f"{of_folder}.widgets.find((w) => w.type === 'button')"
    page.js(f"{button}.callback()")
    page.js(
        """const graph = window.app.graph, train = graph.nodes.find((n) => n.type === "SaraTrain");
        const number = LiteGraph.createNode("PrimitiveFloat");
        graph.add(number);
        number.connect(0, train, train.inputs.findIndex((i) => i.name === "weight_decay"));"""
    )
    heights = """return window.app.graph.nodes.filter((n) => n.type.startsWith("Sara")).map((n) => n.size[1])"""
    page.reopen()
    before = page.js(heights)
    for _ in range(2):
        page.reopen()
        found = page.js(heights)
        assert len(found) == len(before)
        assert all(now <= then + 1 for now, then in zip(found, before, strict=True))


def test_what_is_linked_is_not_folded_away(page):
    page.drop(WORKFLOWS / "5 Look at the small weights.json")
    page.js(
        """const graph = window.app.graph, train = LiteGraph.createNode("SaraTrain");
        train.pos = [2000, 0];
        graph.add(train);
        graph.nodes.find((n) => n.type === "SaraAnalyze").connectByType(
          graph.nodes.find((n) => n.type === "SaraAnalyze").outputs.findIndex((o) => o.type === "FLOAT"),
          train, "FLOAT");"""
    )
    linked = """const node = window.app.graph.nodes.find((n) => n.type === "SaraTrain");
        return [node.inputs.filter((i) => i.type === "FLOAT" && i.link != null).map((i) => i.name),
          node.widgets.find((w) => w.name === "threshold").hidden,
          node.widgets.find((w) => w.name === "weight_decay").hidden];"""
    names, is_hidden, others = page.js(linked)
    assert names == ["threshold"]
    assert not is_hidden
    native = "return window.app.graph.nodes.find((n) => n.type === 'SaraTrain').widgets.find((w) => w.type === 'button').hidden"
    assert others or page.js(native)


def test_the_folder_is_seen_before_anything_runs(page):
    bare = page.server.base / "input" / "bare v1."
    bare.mkdir(exist_ok=True)
    (bare / "caf\u00e9 \u732b.png").write_bytes(
        (page.server.base / "input" / "fluent3d" / "bat.png").read_bytes()
    )
    page.drop(WORKFLOWS / f"{TRAIN}.json")
    box = page.box("SaraImageFolder")
    page.wait("return arguments[0].innerText.includes('choose a folder of pictures')", box)
    page.set_widgets("SaraImageFolder", folder="input/fluent3d")
    page.wait("return arguments[0].innerText.includes('40 pictures, 40 captions from .txt')", box)
    page.wait(
        "const all = [...arguments[0].querySelectorAll('img')];"
        "return all.length === 24 && all.slice(0, 3).every((i) => i.complete && i.naturalWidth > 0)",
        box,
    )
    assert "3d style, bat" in page.text("SaraImageFolder")
    page.set_widgets("SaraImageFolder", folder="input/bare v1.")
    page.wait("return arguments[0].innerText.includes('No picture has a caption')", box)
    page.wait("return arguments[0].querySelector('img')?.naturalWidth > 0", box)


def test_the_histogram_and_the_threshold_follow_each_other(page):
    from selenium.webdriver.common.action_chains import ActionChains

    page.drop(WORKFLOWS / "5 Look at the small weights.json")
    page.set_for_the_small_model()
    page.set_widgets("KSampler", steps=1)
    page.command("Comfy.QueuePrompt")
    kind = "SaraAnalyze"
    text = page.wait(
        "const t = arguments[0].innerText; return t.includes('weights (') && t", page.box(kind)
    )
    assert "1.05 M of 10.5 M weights (10.0 %)" in text
    assert "delta about 2.7" in text
    assert "training takes 17.9 MB more memory" in text
    idle(page)
    page.show(kind)
    assert page.inked(kind) > 0.02
    shades = {colour for _, colour in page.colours(kind)}
    assert (0x4A, 0xA3, 0xFF) in shades  # what is selected
    assert (0x77, 0x77, 0x77) in shades  # the rest
    canvas = page.js("return arguments[0].querySelector('canvas')", page.box(kind))
    place = "return [...window.app.graph.nodes.find((n) => n.type === 'SaraAnalyze').pos]"
    before, seen = page.js(place), []
    for part in (0.6, 0.7):
        # Offsets are from the middle of the element.
        offset = round((part - 0.5) * canvas.rect["width"])
        actions = ActionChains(page.driver, duration=50)
        actions.move_to_element_with_offset(canvas, 0, 10).click_and_hold()
        actions.move_to_element_with_offset(canvas, offset, 10).release().perform()
        value = page.widget(kind, "threshold")
        page.wait(
            "return arguments[0].innerText.startsWith('threshold ' + arguments[1])",
            page.box(kind),
            page.js("return arguments[0].toPrecision(3)", value),
        )
        seen.append((value, page.text(kind)))
    assert 0 < seen[0][0] < seen[1][0]
    assert seen[0][1] != seen[1][1]
    recorded = (
        "return window.app.extensionManager.workflow.activeWorkflow.changeTracker.activeState.nodes"
        ".find((n) => n.type === 'SaraAnalyze').widgets_values[0]"
    )
    page.wait(f"{recorded} === arguments[0]", seen[1][0])  # so it can be undone
    page.command("Comfy.Undo")
    page.wait(  # the graph is made anew, and shows the analysis again
        "const node = window.app.graph.nodes.find((n) => n.type === 'SaraAnalyze');"
        "const box = node.widgets.find((w) => w.type === 'sara_chart').element;"
        "return box.innerText.startsWith('threshold ' + arguments[0].toPrecision(3) + ':')",
        seen[0][0],
    )
    time.sleep(1)  # until it has been laid out
    canvas = page.js("return arguments[0].querySelector('canvas')", page.box(kind))
    actions = ActionChains(page.driver, duration=50)
    actions.move_to_element_with_offset(canvas, 0, 10).click_and_hold()
    actions.move_to_element_with_offset(canvas, -round(canvas.rect["width"] / 2) + 1, 10)
    actions.release().perform()
    assert page.widget(kind, "threshold") == pytest.approx(1e-6)  # 0 would stand for the fraction
    page.set_widgets(kind, threshold=0.0075)
    page.wait("return arguments[0].innerText.startsWith('threshold 0.00750: ')", page.box(kind))
    assert page.js(place) == before  # the node was not dragged along


def test_the_card_tells_what_is_in_a_file(page):
    files = []
    for of in ("model", "each layer"):
        first_training(page, trigger_words=f"of {of}", select_from=of)
        page.command("Comfy.QueuePrompt")
        page.wait("return /: finished, step 6/.test(arguments[0].innerText)", page.box("SaraTrain"))
        idle(page)
        folder = page.server.base / "output" / "sara"
        files.append(max(folder.glob("fluent3d_*/*_6_steps.safetensors")))
    assert files[0] != files[1]
    with safe_open(files[0], "pt") as file:
        threshold = float(file.metadata()["sara.threshold"])
    page.drop(WORKFLOWS / f"{USE}.json")
    selected = (
        f"1.05 M weights below {threshold:.3g}",
        "1.05 M weights, the smallest 10 % of each layer",
    )
    for of, path, which in zip(("model", "each layer"), files, selected, strict=True):
        page.set_widgets("SaraLoadDelta", delta_name=path.relative_to(folder).as_posix())
        box = page.box("SaraLoadDelta")
        page.wait(
            "return arguments[0].innerText.includes(arguments[1])", box, f"trigger words: of {of}"
        )
        text = page.text("SaraLoadDelta")
        for part in ("fluent3d", "for sd3 (flow)", which, "6 steps of 2 pictures"):
            assert part in text, text
    assert page.js("return arguments[0].querySelector('img').naturalWidth", box) == 64
    page.set_widgets("SaraLoadDelta", delta_name="no such file.safetensors")
    page.wait("return arguments[0].innerText.includes('this file is not there')", box)


def test_the_arithmetic_of_the_histogram(page):
    def entropy(p):
        return -p * math.log2(p) - (1 - p) * math.log2(1 - p)

    found = page.later(
        """const { below, fileBytes } = await import("/extensions/ComfyUI-SaRA/sara_analyze.js");
        return [
          [0, 1, 1.5, 2, 3.999, 4, 9].map((t) => below([0, 1, 2, 4], [10, 20, 40], t)),
          [[0, 100], [10, 100], [100, 100]].map(([k, n]) => fileBytes(k, n)),
        ];"""
    )
    assert found[0] == pytest.approx([0, 10, 20, 30, 30 + 40 * 1.999 / 2, 70, 70])
    assert found[1] == pytest.approx(
        [0, 10 * 2 + (100 * entropy(0.1) + 0.2 * 10) / 8, 100 * 2 + 0.2 * 100 / 8]
    )


def test_the_widgets_speak_their_users_language(page):
    """Names of nodes are the frontend's part; 1.32 passes them by, newer ones translate them."""
    page.server.post("/settings/Comfy.Locale", "fr")
    try:
        page.open()
        page.drop(WORKFLOWS / f"{USE}.json")
        page.set_widgets("SaraLoadDelta", delta_name="no such file.safetensors")
        french = json.loads((WORKFLOWS.parent / "locales" / "fr" / "main.json").read_text())
        page.wait(
            "return arguments[0].textContent === arguments[1]",
            page.box("SaraLoadDelta"),
            french["sara"]["missing_file"],
        )
        names = json.loads((WORKFLOWS.parent / "locales" / "fr" / "nodeDefs.json").read_text())
        assert page.server.get("/i18n")["fr"]["nodeDefs"].items() >= names.items()
    finally:
        page.server.post("/settings/Comfy.Locale", "en")
        page.open()


def test_the_help_of_a_node_shows_its_picture(page):
    served = page.later(
        """const answer = await fetch("/extensions/ComfyUI-SaRA/docs/SaraTrain.md");
        const source = /!\\[[^\\]]*\\]\\(([^)]+)\\)/.exec(await answer.text())[1];
        const image = new Image();
        image.src = `/extensions/ComfyUI-SaRA/docs/${source}`;
        await image.decode();
        return [image.naturalWidth, image.naturalHeight];"""
    )
    assert min(served) > 100
