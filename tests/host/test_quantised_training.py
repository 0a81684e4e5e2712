"""8-bit bases train as the numbers they stand for, and stay as they are stored."""

import gc

import comfy.model_management
import comfy.sd as comfy_sd
import pytest
import torch

from . import zoo
from .builders import LOOKS, fail_at, settings, train
from .quantised import (
    E4M3,
    FAMILY,
    LAYER,
    PACKED,
    assert_trained_as_the_numbers,
    delta_of,
    load,
    output,
    raw_bits,
    with_patch,
)


@pytest.mark.parametrize("form", ["e4m3fn", "e5m2", "scaled", "mixed", *PACKED])
def test_training_on_an_8_bit_base_is_what_is_applied(sara, form, monkeypatch):
    patcher = load(form)
    base, before = output(patcher), raw_bits(patcher)
    held = {name: p for name, p in patcher.model.diffusion_model.named_parameters()}
    trained = {}
    original = sara.core.SaraAdamW.restore

    def keep(optimizer):
        from .. import zoo_nodes

        with torch.no_grad():
            trained["output"] = zoo_nodes.output_of(patcher.model, *zoo.examples(FAMILY))
        original(optimizer)

    monkeypatch.setattr(sara.core.SaraAdamW, "restore", keep)
    delta, losses = delta_of(sara, patcher)
    assert len(losses) == 3
    after = dict(patcher.model.diffusion_model.named_parameters())
    for name, parameter in held.items():
        if sara.host.is_quantised(parameter):
            assert after[name] is parameter, name
    assert raw_bits(patcher).keys() == before.keys()
    for name, value in raw_bits(patcher).items():
        assert torch.equal(value, before[name]), name
    found = output(sara.host.apply_delta(patcher, delta, 1.0))
    change = (trained["output"] - base).norm()
    assert change > 0
    assert (found - trained["output"]).norm() < 1e-3 * change + 1e-6 * base.norm()
    assert delta.fits_base(sara.host.base_weights(patcher))


@pytest.mark.parametrize("form", ["e4m3fn", "e5m2", "scaled", "mixed", "half", "bfloat16", *PACKED])
def test_the_delta_is_that_of_training_the_numbers(sara, form):
    assert_trained_as_the_numbers(sara, form, FAMILY, gradient_checkpointing=True)


@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("form", ["e4m3fn", "scaled", "mixed", "half"])
def test_a_lora_that_the_model_carries_is_part_of_what_trains(sara, form, offloading):
    small = with_patch(load(form))
    weights = sara.host.patched_weights(small)
    state = {name: weights[name].detach().float().clone() for name in weights}
    buffers = small.model.diffusion_model.named_buffers()
    state |= {name: buffer.float() for name, buffer in buffers}
    with torch.inference_mode():
        state = {**zoo.weights_of(FAMILY), **state}
        wide = comfy_sd.load_diffusion_model_state_dict(state, {"dtype": torch.float32})
    options = {"zeros": "train", "training_dtype": "fp32", "offloading": offloading}
    _, expected = delta_of(sara, wide, **options)
    delta, losses = delta_of(sara, small, **options)
    assert losses[0] == pytest.approx(expected[0], rel=1e-3)
    assert delta.fits_base(sara.host.patched_weights(small))


@pytest.mark.parametrize("in_half", [False, True])
@pytest.mark.parametrize("form", ["float32", "half"])
def test_a_lora_is_added_as_to_a_model_that_is_loaded_whole(sara, form, in_half, monkeypatch):
    management = comfy.model_management
    if in_half:  # as on graphics cards, since 0.33
        if not hasattr(management, "lora_compute_dtype"):
            pytest.skip("this ComfyUI adds patches in float32 on all devices")
        monkeypatch.setattr(management, "lora_compute_dtype", lambda device: torch.float16)

    def weights(offloading):
        patcher = with_patch(load(form))
        expected = sara.host.patched_weights(patcher)
        with sara.host.trainable(patcher, None, offloading=offloading) as calls:
            parameters = dict(calls.model.diffusion_model.named_parameters())
            return [(name, parameters[name].detach() + 0.0, expected[name]) for name in expected]

    base, num_patched = sara.host.base_weights(load(form)), 0
    for (name, waiting, expected), (_, whole, _) in zip(weights(True), weights(False), strict=True):
        assert torch.equal(waiting.float(), whole.float()), name
        assert torch.equal(whole.float(), expected.float()), name
        num_patched += not torch.equal(whole.float(), base[name].float())
    assert num_patched > 0


@pytest.mark.parametrize("form", ["e4m3fn", "scaled", "mixed"])
def test_training_goes_on_from_a_delta_that_the_model_carries(sara, form):
    small = load(form)
    first, losses = delta_of(sara, small, learning_rate=2e-3)
    carrying = sara.host.apply_delta(small, first, 1.0)
    _, again = delta_of(sara, carrying, learning_rate=2e-3)
    assert again[0] != losses[0]
    assert again[0] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    ("own", "compute", "scaled"),
    [
        (torch.float16, "auto", False),  # float32, on a processor
        (torch.float16, "fp32", False),
        (torch.float16, "bf16", True),  # the gradient of a float16 weight is float16
        (torch.float16, "fp16", True),
        (torch.bfloat16, "auto", False),
        (torch.bfloat16, "bf16", False),
        (torch.float32, "fp16", True),
        (E4M3, "auto", False),
        (E4M3, "fp16", True),
    ],
)
def test_the_loss_is_scaled_where_gradients_are_float16(sara, own, compute, scaled):
    with torch.inference_mode():
        state = zoo.weights_of(FAMILY)
        patcher = comfy_sd.load_diffusion_model_state_dict(state, {"dtype": own})
    dtype = sara.settings.COMPUTE_DTYPES[compute]
    with sara.host.trainable(patcher, dtype) as calls:
        assert sara.host.needs_loss_scaling(patcher, dtype) == scaled
        layer = calls.model.diffusion_model.get_submodule(LAYER.removesuffix(".weight"))
        assert layer.weight.requires_grad


SAME_NETWORK = ("SDXL v", "SDXL EDM", "SDXL refiner", "SD2.1 v", "SD3.5")  # as another family's
SMALL = [name for name, f in zoo.FAMILIES.items() if not f.large and name not in SAME_NETWORK]


@pytest.mark.parametrize("family", SMALL)
def test_every_family_trains_in_float8_as_its_numbers_do(sara, family):
    assert_trained_as_the_numbers(sara, "e4m3fn", family, steps=2)


@pytest.mark.parametrize("form", ["e4m3fn", "scaled", "mixed", *PACKED])
def test_training_holds_no_layer_in_numbers_between_its_uses(sara, form):
    patcher = load(form)
    model = patcher.model.diffusion_model
    large = [p for p in model.parameters() if p.dim() == 2 and p.numel() >= 10_000]
    others = {tuple(p.shape) for p in large if not sara.host.is_quantised(p)}
    shapes = {tuple(p.shape) for p in large if sara.host.is_quantised(p)} - others
    shapes -= {shape[::-1] for shape in others}
    assert len(shapes) >= 3
    held = []

    def look(*_):
        gc.collect()
        everything = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
        numbers = [t for t in everything if t.dtype == torch.float32 and t.dim() == 2]
        held.append([tuple(t.shape) for t in numbers if {tuple(t.shape), tuple(t.shape)[::-1]} & shapes])  # fmt: skip

    hook = model.final_layer.register_forward_hook(look)
    delta_of(sara, patcher, steps=1)
    hook.remove()
    assert held
    assert not any(held), held


@pytest.mark.parametrize("ending", ["cancel", "error", "out of memory"])
def test_stored_weights_survive_every_ending(sara, monkeypatch, ending):
    import comfy.model_management as management

    patcher = load("scaled")
    output(patcher)  # as it is loaded, 0.33 replaces some
    before, held = raw_bits(patcher), dict(patcher.model.diffusion_model.named_parameters())
    kinds = {
        "cancel": management.InterruptProcessingException,
        "out of memory": torch.OutOfMemoryError,
    }
    raised = kinds.get(ending, ValueError)
    step = sara.core.SaraAdamW.step

    def fail(optimizer, closure=None):
        step(optimizer, closure)
        if optimizer.num_steps == 2:
            raise raised()

    monkeypatch.setattr(sara.core.SaraAdamW, "step", fail)
    with pytest.raises(raised):
        delta_of(sara, patcher)
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        assert parameter is held[name] or not sara.host.is_quantised(held[name]), name
    for name, value in raw_bits(patcher).items():
        assert torch.equal(value, before[name]), name


def test_a_lora_on_eight_bits_is_not_gone_on_with_the_other_way(sara, tmp_path):
    """Loaded whole it is rounded into the weights; offloaded it is added to their numbers."""
    latents, captions = zoo.examples(FAMILY)
    options = {"steps": 3, "learning_rate": 2e-3, "fraction": 0.1, "low_rank_weight": 0.0}
    folder = sara.folder.RunFolder.create(tmp_path, "run", settings(sara, **options))
    patcher = with_patch(load("e4m3fn"))
    hook = patcher.model.diffusion_model.register_forward_hook(fail_at(LOOKS + 3))
    with pytest.raises(KeyboardInterrupt):
        train(sara, patcher, latents, captions, None, new=folder)
    hook.remove()
    again = sara.folder.RunFolder(folder.path)
    again.settings = settings(sara, offloading=True, **options)
    with pytest.raises(ValueError, match="were rounded to eight bits: set offloading as it was"):
        train(sara, patcher, latents, captions, None, resume=again)
    again = sara.folder.RunFolder(folder.path)
    assert len(train(sara, patcher, latents, captions, None, resume=again)[1]) == 3
