"""Models whose weights ComfyUI 0.33 and newer stream to the GPU piece by piece.

ComfyUI does not do so on a CPU; its refusal is taken out here, and what a GPU does to a layer's
patches while it casts the layer is done by hand, with ComfyUI's own LowVramPatch.
"""

import comfy.model_patcher as patchers
import comfy.sd as comfy
import pytest
import torch
from safetensors.torch import load_file, save_file

from .builders import pairs, settings, train
from .models import write_mini_sd15

pytestmark = pytest.mark.skipif(
    not hasattr(patchers, "ModelPatcherDynamic"), reason="ComfyUI has no dynamic models yet"
)
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def load(tmp_path, monkeypatch, sara):
    """Load the miniature, dynamic or not, in float32 or float8."""
    import comfy_aimdo.host_buffer

    class Buffer:  # the real one pins memory for a GPU
        size = 0

        def __init__(self, *_): ...

        def truncate(self, *_, **__): ...

    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", Buffer)
    dynamic = patchers.ModelPatcherDynamic
    monkeypatch.setattr(dynamic, "__new__", lambda cls, *_, **__: object.__new__(cls))
    path = tmp_path / "float32.safetensors"
    write_mini_sd15(path)
    small = {k: w.to(FLOAT8) if w.dim() > 1 else w for k, w in load_file(path).items()}
    save_file(small, tmp_path / "float8.safetensors")

    def load(name, is_dynamic):
        kind = dynamic if is_dynamic else patchers.ModelPatcher
        monkeypatch.setattr(patchers, "CoreModelPatcher", kind)
        options = {"dtype": FLOAT8} if name == "float8" else {}
        file = str(tmp_path / f"{name}.safetensors")
        with torch.inference_mode():
            return comfy.load_diffusion_model(file, model_options=options)

    return load


def output(patcher):
    import comfy.model_management as management

    with torch.inference_mode():
        management.load_models_gpu([patcher])
        for module in patcher.model.modules() if patcher.is_dynamic() else ():
            for kind in ("weight", "bias"):
                patch = getattr(module, f"{kind}_lowvram_function", None)
                if patch is not None:
                    buffer = torch.zeros(max(1, patch.memory_required()), dtype=torch.uint8)
                    patch.prepare(buffer, None, copy=True, commit=True)
                    getattr(module, f"{kind}_function").append(patch)
        generator = torch.Generator().manual_seed(5)
        noisy = torch.randn(2, 4, 8, 8, generator=generator)
        caption = torch.randn(2, 77, 768, generator=generator)
        sigma = torch.tensor([3.0, 7.0])
        return patcher.model.apply_model(noisy, sigma, c_crossattn=caption).clone()


@pytest.mark.parametrize("name", ["float32", "float8"])
def test_dynamic_models_train_and_apply_as_others(load, sara, name):
    dynamic, plain = load(name, True), load(name, False)
    assert dynamic.is_dynamic()
    assert not plain.is_dynamic()
    expected_base = output(plain)
    assert torch.equal(output(dynamic), expected_base)  # and it is loaded now, as after sampling
    before = {n: w.clone() for n, w in sara.host.base_weights(dynamic).items()}
    options = settings(sara, learning_rate=3e-3)
    found, losses = train(sara, dynamic, *pairs(4), options)
    delta, expected_losses = train(sara, plain, *pairs(4), options)
    assert losses == expected_losses
    for key, entry in delta.entries.items():
        assert torch.equal(found.entries[key].values, entry.values)
    after = sara.host.base_weights(dynamic)
    assert all(torch.equal(weight, after[key]) for key, weight in before.items())
    assert found.fits_base(after)

    one = sara.host.apply_delta(dynamic, found, 1.0)
    expected = output(sara.host.apply_delta(plain, delta, 1.0))
    change = (expected - expected_base).abs().max()
    difference = (output(one) - expected).abs().max()
    if name == "float32":
        assert len(one.patches) == len(found.entries)
        assert difference == 0
    else:  # layers of at most 16 kB are patched in, and rounded
        assert 0 < len(one.patches) < 5 < len(one.weight_wrapper_patches)
        assert difference < 0.05 * change
    assert change > 1
    assert torch.equal(output(dynamic), expected_base)


def test_a_dynamic_model_that_cannot_be_loaded_whole_is_refused(load, sara):
    dynamic = load("float32", True)
    dynamic.cached_patcher_init = None  # as loaders of other packs leave it
    with pytest.raises(ValueError, match="load it with Load Checkpoint or Load Diffusion Model"):
        train(sara, dynamic, *pairs(2), settings(sara))
