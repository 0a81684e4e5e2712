"""The same miniature in every weight format, and what is compared with its numbers."""

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


LAYER = "joint_blocks.0.x_block.mlp.fc1.weight"


def with_patch(patcher):
    """Return the MODEL with a change of one layer, as a LoRA's."""
    patched = patcher.clone()
    change = torch.randn(512, 128, generator=torch.Generator().manual_seed(1)) * 0.01
    assert patched.add_patches({f"diffusion_model.{LAYER}": ("diff", (change,))}, 1.0)
    return patched


def raw_bits(patcher):
    found = {}
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        data = getattr(parameter, "_qdata", parameter.detach())
        found[name] = data.detach().clone().reshape(-1).view(torch.uint8)
    return found
