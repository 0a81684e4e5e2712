"""8-bit bases: trained on the numbers they stand for, and deltas applied without being rounded away."""

import pytest
import torch

from . import zoo
from .quantised import FAMILY, PACKED, delta_of, load, output


@pytest.mark.parametrize("form", ["e4m3fn", "e5m2", "scaled", "mixed", *PACKED])
def test_a_delta_keeps_its_effect_on_an_8_bit_base(sara, form):
    full, small = load("float32"), load(form)
    delta, _ = delta_of(sara, full)
    change = output(sara.host.apply_delta(full, delta, 1.0)) - output(full)
    base = output(small)
    applied = sara.host.apply_delta(small, delta, 1.0)
    ours = output(applied) - base
    noise = (base - output(full)).norm()
    assert change.norm() > 0
    assert (ours - change).norm() < 0.25 * change.norm(), (ours.norm(), change.norm(), noise)
    assert torch.equal(output(small), base)  # nothing is left behind
    assert sara.host.patches_carried(small) == ""
    assert sara.host.patches_carried(applied) == f"sara on {len(delta.entries)} parameters"
    twice = output(sara.host.apply_delta(applied, delta, -1.0)) - base
    assert twice.norm() < 1e-4 * change.norm() + 1e-5 * base.norm()


def test_patched_in_a_small_delta_would_be_lost(sara, monkeypatch):
    full, small = load("float32"), load("e4m3fn")
    delta, _ = delta_of(sara, full, learning_rate=2e-4)
    change = output(sara.host.apply_delta(full, delta, 1.0)) - output(full)
    ours = output(sara.host.apply_delta(small, delta, 1.0)) - output(small)
    monkeypatch.setattr(sara.host.patches, "is_quantised", lambda weight: False)
    patched = output(sara.host.apply_delta(small, delta, 1.0)) - output(small)
    assert (ours - change).norm() < 0.25 * change.norm()
    assert (patched - change).norm() > 0.5 * change.norm()


def test_rounded_weights_train_where_padding_would_be_passed_by(sara):
    patcher = load("e4m3fn")
    stored = sara.host.base_weights(patcher).stored
    zeros = sum(int((w.float() == 0).sum()) for w in stored.values() if w.element_size() == 1)
    assert zeros > 1000
    assert sara.host.zero_rule(patcher, "auto") == "train"
    assert sara.host.zero_rule(patcher, "skip") == "skip"
    assert sara.host.zero_rule(load("float32"), "auto") == "auto"
    delta, _ = delta_of(sara, patcher, fraction=0.05)
    for name, entry in delta.entries.items():
        base = sara.host.base_weights(patcher)[name].float().flatten()[entry.index.long()]
        assert base.abs().max() <= 2**-9


def test_analyze_reads_scaled_weights_as_the_numbers_they_stand_for(sara):
    full, scaled = load("float32"), load("scaled")
    one, two = (sara.host.base_weights(p) for p in (full, scaled))
    name = "joint_blocks.0.x_block.mlp.fc1.weight"
    assert (one[name].detach() - two[name]).abs().max() < 0.04 * one[name].detach().abs().max()
    assert sara.host.is_quantised(two.stored[name])


@pytest.mark.parametrize("form", ["float32", "e4m3fn"])
def test_weights_left_outside_the_device_get_the_delta_when_they_are_used(sara, form):
    """What --lowvram does: layers are cast and patched one by one as they are called."""
    from .. import zoo_nodes

    patcher = load(form)
    delta, _ = delta_of(sara, load("float32"))
    base, expected = output(patcher), output(sara.host.apply_delta(patcher, delta, 1.0))
    assert (expected - base).norm() > 0
    output(patcher)
    patcher.detach()
    applied = sara.host.apply_delta(patcher, delta, 1.0)
    with torch.inference_mode():
        applied.load(torch.device("cpu"), lowvram_model_memory=1)
        layer = applied.model.diffusion_model.joint_blocks[0].x_block.mlp.fc1
        assert layer.weight_function
        found = zoo_nodes.output_of(applied.model, *zoo.examples(FAMILY))
    applied.detach()
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(output(patcher), base)


def test_analyze_counts_the_zeros_of_float8(sara):
    from sara_pack.sara_core.weights.analysis import analyze

    weights = sara.host.trainable_weights(load("e4m3fn"))
    found = analyze(weights, fraction=0.1, zeros="train")
    zeros = sum(int((w.float() == 0).sum()) for w in weights.stored.values() if w.dim() > 0)
    assert zeros > 1000
    assert found.survey.num_zeros == zeros


def test_copies_of_a_delta_are_let_go_of_with_the_model(sara):
    patcher = load("e4m3fn")
    delta, _ = delta_of(sara, load("float32"))
    applied = sara.host.apply_delta(patcher, delta, 1.0)
    additions = [f for fs in applied.weight_wrapper_patches.values() for f in fs]
    assert len(additions) > 10
    for addition in additions:  # as a GPU's copy would be kept
        addition._copies[torch.device("meta")] = (addition.index, addition.values)
    applied.detach()
    assert not any(addition._copies for addition in additions)


def test_the_fingerprint_of_a_scaled_base_is_of_its_numbers_with_a_lora_on_them(sara):
    patcher = load("scaled")
    with_lora = patcher.clone()
    key = "diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"
    assert with_lora.add_patches({key: ("diff", (torch.ones(512, 128) * 0.01,))}, 1.0)
    delta, _ = delta_of(sara, with_lora)
    assert delta.fits_base(sara.host.patched_weights(with_lora))
    assert not delta.fits_base(sara.host.base_weights(patcher))
    plain, _ = delta_of(sara, patcher)
    assert plain.fits_base(sara.host.base_weights(patcher))
