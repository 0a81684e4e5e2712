"""Nodes that load, apply, merge and save, through a server."""

import shutil

import pytest
import torch

from sara_core import SparseDelta

from ..harness.server import PromptError
from .graphs import Graph, dataset, emoji64, sample, saved_latents


def test_pictures_change_with_the_delta_and_hardly_with_zeroed_weights(server, trained):
    base, tuned, zeroed = (saved_latents(server, n) for n in ("base", "trained", "zeroed"))
    change = (tuned - base).norm()
    assert change > 0.1 * base.norm()
    assert (zeroed - base).norm() < 0.5 * change


def test_loading_and_applying_gives_the_trained_model_and_strength_zero_the_base(
    server, trained, delta_name
):
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    delta = graph("SaraLoadDelta", delta_name=delta_name)
    applied = graph("SaraApply", model=model, delta=delta, strength=1.0)
    nothing = graph("SaraApply", model=applied, delta=delta, strength=0.0)
    off = graph("SaraApply", model=model, delta=delta, strength=0.0)
    opposite = graph("SaraApply", model=applied, delta=delta, strength=-1.0)
    for name, m in (("applied", applied), ("nothing", nothing), ("off", off), ("back", opposite)):
        sample(graph, checkpoint, empty, m, name)
    graph.run()
    assert torch.equal(saved_latents(server, "applied"), saved_latents(server, "trained"))
    assert torch.equal(saved_latents(server, "nothing"), saved_latents(server, "trained"))
    assert torch.equal(saved_latents(server, "off"), saved_latents(server, "base"))
    back, base = saved_latents(server, "back"), saved_latents(server, "base")
    assert torch.allclose(back, base, atol=1e-3)


def test_deltas_are_found_in_models_output_and_extra_folders(server, delta_name):
    source = server.base / "output" / "sara" / delta_name
    folders = ("models/sara", "elsewhere/deltas")
    for folder in folders:
        (server.base / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, server.base / folder / f"from_{folder[:6]}.safetensors")
        (server.base / folder / "other.txt").write_text("no delta")
    listed = server.get("/object_info")["SaraLoadDelta"]["input"]["required"]["delta_name"][1]
    assert {delta_name, "from_models.safetensors", "from_elsewh.safetensors"} <= set(
        listed["options"]
    )
    assert "other.txt" not in listed["options"]


def test_merge_and_save_write_what_the_core_computes(server, delta_name):
    graph = Graph(server)
    delta = graph("SaraLoadDelta", delta_name=delta_name)
    merged = graph("SaraMergeDeltas", delta_1=delta, delta_2=delta, strength_1=0.6, strength_2=-0.1)
    for dtype in ("fp32", "fp16"):
        graph("SaraSaveDelta", delta=merged, filename_prefix=f"sara/merged_{dtype}", dtype=dtype)
    graph.run()
    graph("SaraSaveDelta", delta=merged, filename_prefix="sara/merged_fp32", dtype="bf16")
    graph.run()  # a second file of the same name gets the next number
    folder = server.base / "output" / "sara"
    one = SparseDelta.load(folder / delta_name)
    expected = 0.6 * one + -0.1 * one
    files = {
        "merged_fp32_00001_": torch.float32,
        "merged_fp16_00001_": torch.float16,
        "merged_fp32_00002_": torch.bfloat16,
    }
    for file, dtype in files.items():
        found = SparseDelta.load(folder / f"{file}.safetensors")
        for name, entry in expected.entries.items():
            assert torch.equal(found.entries[name].index, entry.index)
            assert torch.equal(found.entries[name].values, entry.values.to(dtype))


def test_files_outside_the_folders_cannot_be_reached(server):
    for name in ("../../server.log", "/etc/passwd", "missing.safetensors"):
        graph = Graph(server)
        delta = graph("SaraLoadDelta", delta_name=name)
        graph("SaraSaveDelta", delta=delta)
        with pytest.raises(PromptError, match="not in list|there is no delta"):
            graph.run()
    graph = Graph(server)
    checkpoint, model, empty = emoji64(graph)
    data = dataset(graph, checkpoint)
    train = graph(
        "SaraTrain", model=model, latents=data, positive=data.out(1), steps=1,
        output_name="../../escaped",
    )  # fmt: skip
    with pytest.raises(PromptError, match="output folder"):
        graph.run()
    assert train
    assert not list(server.base.parent.glob("**/escaped*"))
