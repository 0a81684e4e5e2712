"""What training holds: no second copy, moments in eight bits; and what is said of it."""

import dataclasses
import sys
import tempfile

import pytest
import torch

from .builders import assert_same_bits, bits, pairs, settings, train


def test_training_needs_no_second_copy_of_the_weights(sd15, sara):
    latents, captions = pairs(2)
    sizes = []

    def look(module, inputs, output):
        import gc

        gc.collect()
        seen = {}
        for item in gc.get_objects():
            if type(item) in (torch.Tensor, torch.nn.Parameter) and item.numel() >= 1_000_000:
                seen[item.data_ptr()] = item.numel()
        sizes.append(sum(seen.values()))

    hook = sd15.model.diffusion_model.out.register_forward_hook(look)
    train(sara, sd15, latents, captions, settings(sara, steps=1))
    hook.remove()
    large = sum(
        p.numel() for p in sd15.model.diffusion_model.parameters() if p.numel() >= 1_000_000
    )
    assert sizes[0] <= 1.3 * large


def test_moments_in_eight_bits_learn_nearly_the_same(sd15, sara):
    latents, captions = pairs(4)
    options = settings(sara, steps=20, learning_rate=1e-4, exclude="")
    expected, losses = train(sara, sd15, latents, captions, options)
    in_eight_bits = dataclasses.replace(options, moments="8bit")
    found, losses_too = train(sara, sd15, latents, captions, in_eight_bits)
    assert losses == pytest.approx(losses_too, rel=0.01)
    one, two = (
        torch.cat([entry.values for entry in delta.entries.values()]) for delta in (expected, found)
    )
    assert not torch.equal(one, two)
    assert ((one - two).norm() / one.norm()).item() < 0.1


def test_moments_in_eight_bits_without_torchao_are_refused_before_anything_runs(sara, monkeypatch):
    from sara_pack.nodes.training.train import SaraTrain

    assert SaraTrain.validate_inputs(["new run"], ["8bit"]) is True
    sara.eight_bits._map.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.optim.quant_utils", None)
    assert "pip install -U torchao" in SaraTrain.validate_inputs(["new run"], ["8bit"])
    assert SaraTrain.validate_inputs(["new run"]) is True
    assert SaraTrain.validate_inputs([None], [None]) is True  # linked
    assert "expected one of fp32, 8bit" in SaraTrain.validate_inputs(["new run"], ["4bit"])


def needs(sara, patcher, monkeypatch, free=None, fail=None, **changes):
    """Train a step; returns what was said of memory, the warnings, and what the chart shows."""
    from sara_pack.nodes.training import memory

    found, measure = [], memory.measure

    def kept(*given):
        found.append(measure(*given))
        return found[-1]

    monkeypatch.setattr(memory, "measure", kept)
    if free is not None:
        monkeypatch.setattr(sara.host, "memory_in_use", lambda: (10**12 - free, 10**12))
    if fail is not None:
        monkeypatch.setattr(sara.run.TrainingRun, "rehearse", fail)
    latents, captions = pairs(4)
    options = settings(sara, **{"steps": 1, "batch_size": 4, "caption_dropout": 0.0, **changes})
    with tempfile.TemporaryDirectory() as parent:
        folder = sara.folder.RunFolder.create(parent, "run", options)
        given = sara.examples.Examples(latents, captions)
        _, _, chart = sara.run.run(patcher, given, folder, None)
        text = (folder.path / "log.txt").read_text()
    return found[0], text, chart


def test_the_need_is_said_before_the_first_step(sd15, sara, monkeypatch):
    need, text, chart = needs(sara, sd15, monkeypatch)
    weights = [p for p in sd15.model.parameters()]
    assert need.base == sum(p.nbytes for p in weights)
    trained = next(int(word) for word in text.split() if word.isdigit() and int(word) > 10_000)
    assert need.trained == 17 * trained
    assert need.batch_size == 4
    assert 0 < need.picture < need.activations
    assert need.fits
    assert chart["warnings"] == []
    shown = {"base": need.base, "trained": need.trained, "activations": need.activations}
    assert chart["memory_need"] == shown
    assert text.index("memory: about") < text.index("training ")


def test_what_would_fit_is_said_with_its_figure(sd15, sara, monkeypatch):
    roomy, _, _ = needs(sara, sd15, monkeypatch)
    monkeypatch.undo()
    short = roomy.picture + roomy.picture // 2  # two pictures too many
    to_come = roomy.trained * 12 // 17  # gradients and moments
    held = roomy.base + roomy.trained - to_come
    need, _, chart = needs(sara, sd15, monkeypatch, free=roomy.total - short - held)
    assert need.largest_batch() == 2
    (line,) = chart["warnings"]
    assert "This is more than there is" in line
    for remedy in ("gradient_checkpointing on", "moments to 8bit", "batch_size to 2 (about ",
                   "offloading on", "trained_in to main memory", "make pictures "):  # fmt: skip
        assert remedy in line
    with_checkpointing, _, _ = needs(sara, sd15, monkeypatch, gradient_checkpointing=True)
    assert with_checkpointing.activations < 0.8 * roomy.activations


def test_memory_that_does_not_do_for_one_picture_is_said(sd15, sara, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    need, _, chart = needs(sara, sd15, monkeypatch, fail=fail)
    assert need is None
    assert "not even one picture fits. To need less memory" in chart["warnings"][0]


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_on_a_processor_offloading_changes_nothing(sd15, sara, dtype):
    latents, captions = pairs(2)
    before = bits(sd15)
    options = settings(sara, steps=2, batch_size=1, fraction=0.1, learning_rate=1e-3, training_dtype=dtype)  # fmt: skip
    expected, _ = train(sara, sd15, latents, captions, options)
    elsewhere = dataclasses.replace(options, offloading=True, trained_in="main memory")
    found, _ = train(sara, sd15, latents, captions, elsewhere)
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        assert torch.equal(found.entries[name].values, entry.values), name
    assert_same_bits(before, sd15)
