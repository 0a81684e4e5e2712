"""Models of GGUF files, as ComfyUI-GGUF loads them; needs a checkout of it in COMFYUI_GGUF, and `gguf`."""

import importlib.util
import os
import sys

import comfy.sd as comfy_sd
import pytest
import torch

from . import zoo
from .quantised import FAMILY, assert_trained_as, delta_of, output, with_patch

PACK = os.environ.get("COMFYUI_GGUF")
FORMS = ["Q8_0", "Q4_0", "Q5_1", "BF16"]

if not PACK:
    pytest.skip("set COMFYUI_GGUF to a checkout of ComfyUI-GGUF", allow_module_level=True)


@pytest.fixture(scope="module")
def pack():
    if "gguf_pack" not in sys.modules:
        options = {"submodule_search_locations": [PACK]}
        spec = importlib.util.spec_from_file_location("gguf_pack", f"{PACK}/__init__.py", **options)
        sys.modules["gguf_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["gguf_pack"])
    return sys.modules["gguf_pack"]


def load(pack, folder, form):
    """Write the miniature to a GGUF file and load it, as the pack's loader does."""
    import gguf

    quantisation = gguf.GGMLQuantizationType[form]
    path = str(folder / f"{form}.gguf")
    writer = gguf.GGUFWriter(path, "sd3")
    for name, weight in zoo.weights_of(FAMILY).items():
        numbers = weight.float().numpy()
        if weight.dim() == 2 and weight.shape[1] % 32 == 0 and "pos_embed" not in name:
            packed = gguf.quants.quantize(numbers, quantisation)
            writer.add_tensor(name, packed, raw_dtype=quantisation)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with torch.inference_mode():
        state = pack.loader.gguf_sd_loader(path)
        options = {"custom_operations": pack.ops.GGMLOps()}
        patcher = comfy_sd.load_diffusion_model_state_dict(state, options)
        return pack.nodes.GGUFModelPatcher.clone(patcher)


def raw_bits(patcher):
    return {n: p.data.numpy().copy() for n, p in patcher.model.diffusion_model.named_parameters()}


def assert_same_bits(patcher, before):
    for name, value in raw_bits(patcher).items():
        assert (value == before[name]).all(), name


@pytest.mark.parametrize("select_by", ["size", "gradient"])
@pytest.mark.parametrize("form", FORMS)
def test_a_gguf_model_trains_as_the_numbers_it_stands_for(sara, pack, tmp_path, form, select_by):
    patcher = load(pack, tmp_path, form)
    base, before = output(patcher), raw_bits(patcher)
    quantised = [p for p in patcher.model.parameters() if sara.host.is_quantised(p)]
    assert len(quantised) > 10
    assert_trained_as(sara, patcher, FAMILY, select_by=select_by)
    assert_same_bits(patcher, before)
    assert torch.equal(output(patcher), base)


def test_a_lora_that_a_gguf_model_carries_is_part_of_what_trains(sara, pack, tmp_path):
    patcher = load(pack, tmp_path, "Q8_0")
    plain = delta_of(sara, patcher)[1]
    patched = with_patch(patcher)
    weights = sara.host.patched_weights(patched)
    state = {name: weights[name].detach().float().clone() for name in weights}
    with torch.inference_mode():
        state = {**zoo.weights_of(FAMILY), **state}
        wide = comfy_sd.load_diffusion_model_state_dict(state, {"dtype": torch.float32})
    delta, losses = delta_of(sara, patched)
    assert losses[0] == pytest.approx(delta_of(sara, wide)[1][0], rel=1e-5)
    assert losses[0] != plain[0]
    assert delta.fits_base(weights)
    assert delta_of(sara, patcher)[1] == plain


@pytest.mark.parametrize("form", FORMS)
def test_a_delta_applies_to_a_gguf_model(sara, pack, tmp_path, form):
    patcher = load(pack, tmp_path, form)
    base = output(patcher)
    delta, _ = delta_of(sara, patcher)
    assert delta.fits_base(sara.host.base_weights(patcher))
    weights = sara.host.base_weights(patcher)
    with torch.inference_mode():
        state = {name: weights[name].detach().float().clone() for name in weights}
        for name, entry in delta.entries.items():
            state[name].view(-1)[entry.index.long()] += entry.values.float()
        state = {**zoo.weights_of(FAMILY), **state}
        wide = comfy_sd.load_diffusion_model_state_dict(state, {"dtype": torch.float32})
    applied = sara.host.apply_delta(patcher, delta, 1.0)
    found, expected = output(applied), output(wide)
    assert (found - base).norm() > 0
    assert (found - expected).norm() < 0.01 * (expected - base).norm()
    assert torch.equal(output(patcher), base)
    assert delta.fits_base(sara.host.patched_weights(patcher))


def test_analyze_counts_packed_weights_as_the_numbers_they_stand_for(sara, pack, tmp_path):
    from sara_pack.nodes.analysis.analyze import SaraAnalyze

    patcher = load(pack, tmp_path, "Q8_0")
    base = sara.host.base_weights(patcher)
    numbers = {n: w.detach().float() for n, w in base.items() if w.dim() > 1}
    SaraAnalyze.hidden = type("hidden", (), {"unique_id": "1", "extra_pnginfo": None})
    found = SaraAnalyze.execute(patcher, 0.0, 0.1, "", "", "", "train")
    every = torch.cat([w.abs().flatten() for w in numbers.values()]).sort().values
    assert found[1] == pytest.approx(float(every[round(0.1 * len(every))]), rel=1e-3)


def test_what_a_gguf_text_encoder_is_can_be_told(sara, pack):
    """Its `state_dict` has no numbers."""
    import gguf

    from ..assets.emoji64 import assemble

    def encoder(changed=0.0):
        state, kind = assemble.clip_l(), gguf.GGMLQuantizationType.Q8_0
        for name in [n for n, w in state.items() if "mlp.fc1.weight" in n]:
            weight = state[name].float() + changed
            raw = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind))
            state[name] = pack.ops.GGMLTensor(raw, tensor_type=kind, tensor_shape=weight.shape)
        return pack.nodes.CLIPLoaderGGUF().load_patcher(
            ["clip_l.gguf"], comfy_sd.CLIPType.STABLE_DIFFUSION, [state]
        )

    with torch.inference_mode():
        one, same, other = (sara.host.clip_facts(encoder(by)) for by in (0.0, 0.0, 0.1))
    assert one == same != other
