"""Every family that can be made small: analysed, trained, saved, loaded and applied by the executor.

What was tried is in docs/families.json and docs/families.md; both are written anew by
`FAMILIES=write python dev.py test tests/host/test_families.py`.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from ..harness.server import Server, make_base
from . import zoo
from .graphs import Graph

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "families.json"
PREDICTIONS = {"EPS": "epsilon", "V_PREDICTION": "v", "FLOW": "flow", "FLUX": "flow", "EDM": "edm"}
STEPS = 2
NOT_SMALL = {  # prediction, why
    "HiDream": ("flow", "ComfyUI fixes its size: 17 B at the least"),
    "Cosmos-Predict2": ("cosmos_flow", "ComfyUI fixes its size: 2 B at the least"),
    "Z-Image": ("flow", "0.9 B at the least; the network is Lumina 2's"),
    "Flux 2": ("flow", "1.7 B at the least; the network is Flux's"),
    "Mochi": ("flow", "ComfyUI fixes its size: 10 B"),
    "OmniGen 2": ("flow", "ComfyUI fixes its size: 4 B"),
    "Stable Cascade": ("epsilon", "ComfyUI fixes its size: 0.7 B at the least"),
}
HEAD = (
    "# Model families",
    "",
    "Each was made as a miniature of random weights that ComfyUI's own detection recognises, as small "
    "as its size can be read from the weights, and taken through ComfyUI's executor on a CPU: analysed, "
    "trained for two steps, saved, loaded, and applied to a copy of the checkpoint loaded anew. "
    "*Trains*: the loss of the last step is that of the family's own objective, worked out by hand from "
    "the same noise. *Applies exactly*: what the applied model puts out is what the trained one did, to "
    "a ten-thousandth of the change. That a miniature trains says nothing about how well a family "
    "learns.",
    "",
    "This page is written by the test suite, from `families.json`.",
    "",
    "| family | miniature | prediction | trains | applies exactly | remark |",
    "|---|---|---|---|---|---|",
)
NOTES = {
    "SDXL v": "SSD-1B's depths",
    "SDXL EDM": "as Playground 2.5; SSD-1B's depths",
    "Flux dev": "changes activations in place, which is allowed for",
    "Flux schnell": "changes activations in place, which is allowed for",
    "Wan 2.1": "its modulation is not trained: ComfyUI does not patch it",
    "HunyuanVideo": "changes activations in place, which is allowed for",
    "LTX-Video": "changes activations in place, which is allowed for; its scale-shift tables are not "
    "trained: ComfyUI does not patch them",
    "PixArt Sigma": "its scale-shift tables are not trained: ComfyUI does not patch them",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("zoo")
    make_base(base)
    shutil.copy(ROOT / "tests" / "zoo_nodes.py", base / "custom_nodes")
    (base / "models" / "diffusion_models").mkdir()
    with Server(base) as running:
        yield running


@pytest.fixture(scope="module")
def records():
    """What is found out about each family, written to the docs once all are through."""
    found = {}
    yield found
    if os.environ.get("FAMILIES") == "write":
        old = {entry["family"]: entry for entry in json.loads(DOCS.read_text())}
        order = [*zoo.FAMILIES, *NOT_SMALL]
        entries = sorted(
            (old | not_tried() | found).values(), key=lambda e: order.index(e["family"])
        )
        DOCS.write_text(json.dumps(entries, indent=1) + "\n")
        DOCS.with_suffix(".md").write_text(page(entries))


def not_tried():
    return {
        family: {"family": family, "parameters": None, "prediction": prediction, "trains": None,
                 "applies_exactly": None, "note": note}
        for family, (prediction, note) in NOT_SMALL.items()
    }  # fmt: skip


def page(entries):
    def cell(value):
        return {True: "yes", False: "no", None: ""}.get(value, value)

    rows = [
        f"| {e['family']} | {e['parameters'] / 1e6:.0f} M | {e['prediction']} | {cell(e['trains'])} | "
        f"{cell(e['applies_exactly'])} | {e['note']} |"
        if e["parameters"]
        else f"| {e['family']} | | {e['prediction']} | not tried | | {e['note']} |"
        for e in entries
    ]
    return "\n".join([*HEAD, *rows, ""])


def slug(family):
    return "".join(c if c.isalnum() else "_" for c in family).lower()


def graph_of(server, family, file):
    graph = Graph(server)
    model = graph("UNETLoader", unet_name=file, weight_dtype="default")
    data = graph("TestExamples", path=zoo.__file__, family=family)
    return graph, model, data


def put_out(graph, model, data, path):
    graph("TestOutput", model=model, latents=data, positive=data.out(1), file=str(path))


def train(server, family, folder, **options):
    """Analyse and train one copy of the checkpoint; returns the run's folder."""
    name = slug(family)
    graph, model, data = graph_of(server, family, f"{name}.safetensors")
    graph("PreviewAny", source=graph("SaraAnalyze", model=model, fraction=0.1).out(2))
    put_out(graph, model, data, folder / "base")
    graph.run()
    graph, model, data = graph_of(server, family, f"{name}.safetensors")
    watched = graph(
        "TestWatch", model=model, latents=data, positive=data.out(1), file=str(folder / "trained")
    )
    options = {"steps": STEPS, "batch_size": 2, "fraction": 0.1, "learning_rate": 1e-3,
               "save_dtype": "fp32", "output_name": name, "save_every_steps": 0, **options}  # fmt: skip
    graph("SaraTrain", model=watched, latents=data, positive=data.out(1), **options)
    graph.run()
    return server.base / "output" / "sara" / f"{name}_00001"


def apply(server, family, delta_name, folder):
    """Apply the saved delta to the other copy of the checkpoint."""
    graph, model, data = graph_of(server, family, f"{slug(family)}_again.safetensors")
    delta = graph("SaraLoadDelta", delta_name=delta_name)
    put_out(graph, graph("SaraApply", model=model, delta=delta, strength=1.0), data,
            folder / "applied")  # fmt: skip
    graph.run()


def outputs(folder):
    return {name: load_file(folder / name) for name in ("base", "trained", "applied")}


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_what_was_trained_is_what_is_loaded(server, records, family, tmp_path):
    models = server.base / "models" / "diffusion_models"
    first = models / f"{slug(family)}.safetensors"
    zoo.write(family, first)
    again = models / f"{slug(family)}_again.safetensors"
    os.link(first, again)
    try:
        run = train(server, family, tmp_path)
        (final,) = run.glob(f"*_{STEPS}_steps.safetensors")
        apply(server, family, f"{run.name}/{final.name}", tmp_path)
    finally:
        server.post("/free", {"unload_models": True, "free_memory": True})
        first.unlink()
        again.unlink()
    row = (run / "loss.csv").read_text().splitlines()[STEPS].split(",")
    shutil.rmtree(run)  # up to 1.4 GB
    found = outputs(tmp_path)
    change = (found["trained"]["output"] - found["base"]["output"]).norm()
    error = (found["applied"]["output"] - found["trained"]["output"]).norm()
    assert change > 0
    assert error <= 1e-4 * change + 1e-6 * found["base"]["output"].norm(), (error, change)
    assert float(row[1]) == pytest.approx(found["trained"]["loss"].item(), rel=1e-4)
    with safe_open(tmp_path / "base", "pt") as file:
        facts = file.metadata()
    assert facts["config"] == zoo.FAMILIES[family].detected
    record(records, family, facts)


def record(records, family, facts):
    """Note a family that has stood every assertion."""
    entry = {
        "family": family,
        "parameters": int(facts["parameters"]),
        "prediction": PREDICTIONS[facts["kind"]],
        "trains": True,
        "applies_exactly": True,
        "note": NOTES.get(family, ""),
    }
    records[family] = entry
    if os.environ.get("FAMILIES") != "write":
        known = {entry["family"]: entry for entry in json.loads(DOCS.read_text())}
        assert known[family] == entry


@pytest.mark.skipif(os.environ.get("FAMILIES") == "write", reason="being written")
def test_the_page_shows_what_the_record_says():
    entries = json.loads(DOCS.read_text())
    assert [entry["family"] for entry in entries] == [*zoo.FAMILIES, *NOT_SMALL]
    assert DOCS.with_suffix(".md").read_text() == page(entries)
