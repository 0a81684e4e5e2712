"""8-bit bases: trained on the numbers they stand for, and deltas applied without being rounded away."""

import gc
import json

import comfy.quant_ops as quant_ops
import comfy.sd as comfy_sd
import pytest
import torch

from . import zoo
from .builders import settings, train

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = {"e4m3fn": E4M3, "e5m2": E5M2, "half": torch.float16, "bfloat16": torch.bfloat16}
FAMILY = "SD3"


PACKED = ("mxfp8", "nvfp4", "int8_tensorwise")  # since 0.33


def packed(state, form):
    """Turn all matrices of the blocks into a packed format of ComfyUI's, or skip the test.

    ComfyUI reads the sizes of other layers from what is stored.
    """
    algorithm = quant_ops.QUANT_ALGOS.get(form)
    if algorithm is None:
        pytest.skip(f"this ComfyUI has no {form}")
    layout = algorithm["comfy_tensor_layout"]
    config = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    blocks = [n for n, w in state.items() if "joint_blocks" in n and w.dim() == 2]
    for name in blocks:
        weight = quant_ops.QuantizedTensor.from_float(state.pop(name).bfloat16(), layout)
        state |= weight.state_dict(name)
        state[name.removesuffix("weight") + "comfy_quant"] = config
    return state


def load(form, family=FAMILY):
    """Load the same miniature in some weight format."""
    state, options, metadata = zoo.weights_of(family), {}, None
    if form in PACKED:
        state = packed(state, form)
    if form in DTYPES:
        options = {"dtype": DTYPES[form]}
    if form in ("scaled", "mixed"):
        names = [n for n, w in state.items() if n.endswith("weight") and w.dim() == 2]
        for name in names:
            scale = state[name].abs().max() / 448
            state[name] = (state[name] / scale).to(E4M3)
            state[name.removesuffix("weight") + ("scale_weight" if form == "scaled" else "weight_scale")] = scale.float()  # fmt: skip
        if form == "scaled":
            state["scaled_fp8"] = torch.zeros(3, dtype=E4M3)
            state = {k: v if v.dtype == E4M3 or "scale" in k else v.half() for k, v in state.items()}  # fmt: skip
        else:
            layers = {name.removesuffix(".weight"): {"format": "float8_e4m3fn"} for name in names}
            metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    with torch.inference_mode():
        if metadata:
            return comfy_sd.load_diffusion_model_state_dict(state, options, metadata=metadata)
        return comfy_sd.load_diffusion_model_state_dict(state, options)


def output(patcher):
    import comfy.model_management

    from .. import zoo_nodes

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
        return zoo_nodes.output_of(patcher.model, *zoo.examples(FAMILY))


def delta_of(sara, patcher, family=FAMILY, **options):
    latents, captions = zoo.examples(family)
    options = {"steps": 3, "learning_rate": 2e-3, "fraction": 0.1, **options}
    return train(sara, patcher, latents, captions, settings(sara, **options))


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


def assert_trained_as_the_numbers(sara, form, family, **options):
    """Same threshold, same gradients: a model loaded in float32 with the numbers the small one stands for."""
    small = load(form, family)
    assert form not in DTYPES or small.model.get_dtype() == DTYPES[form]
    assert_trained_as(sara, small, family, **options)


def assert_trained_as(sara, small, family, **options):
    """Train a MODEL and one with its numbers in float32, and compare."""
    base = sara.host.base_weights(small)
    buffers = dict(small.model.diffusion_model.named_buffers())
    state = {name: w.detach().float() for name, w in (*base.items(), *buffers.items())}
    with torch.inference_mode():
        state = {**zoo.weights_of(family), **state}
        wide = comfy_sd.load_diffusion_model_state_dict(state, {"dtype": torch.float32})
    assert type(wide.model) is type(small.model)
    options = {"zeros": "train", "training_dtype": "fp32", **options}
    expected, losses = delta_of(sara, wide, family, **options)
    found, losses_too = delta_of(sara, small, family, **options)
    assert losses == pytest.approx(losses_too, rel=1e-6)
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        assert torch.equal(found.entries[name].index, entry.index), name
        torch.testing.assert_close(found.entries[name].values, entry.values, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", ["e4m3fn", "e5m2", "scaled", "mixed", "half", "bfloat16", *PACKED])
def test_the_delta_is_that_of_training_the_numbers(sara, form):
    assert_trained_as_the_numbers(sara, form, FAMILY, gradient_checkpointing=True)


LAYER = "joint_blocks.0.x_block.mlp.fc1.weight"


def with_patch(patcher):
    """Return the MODEL with a change of one layer, as a LoRA's."""
    patched = patcher.clone()
    change = torch.randn(512, 128, generator=torch.Generator().manual_seed(1)) * 0.01
    assert patched.add_patches({f"diffusion_model.{LAYER}": ("diff", (change,))}, 1.0)
    return patched


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


@pytest.mark.parametrize("ending", ["cancel", "error"])
def test_stored_weights_survive_every_ending(sara, monkeypatch, ending):
    import comfy.model_management as management

    patcher = load("scaled")
    output(patcher)  # as it is loaded, 0.33 replaces some
    before, held = raw_bits(patcher), dict(patcher.model.diffusion_model.named_parameters())
    raised = management.InterruptProcessingException if ending == "cancel" else ValueError
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


def raw_bits(patcher):
    found = {}
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        data = getattr(parameter, "_qdata", parameter.detach())
        found[name] = data.detach().clone().reshape(-1).view(torch.uint8)
    return found


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
    assert found.cutoff.num_zeros == zeros


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
