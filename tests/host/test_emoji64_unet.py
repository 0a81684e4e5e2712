"""The second small model: ComfyUI takes it for SD1.5, and computes what the study computes."""

import comfy.sd
import pytest
import torch

from ..assets.emoji64 import assemble
from ..emoji64 import unet
from ..emoji64.model import Text
from .builders import assert_same_bits, bits, settings, train

PROMPTS = ("twemoji style, red apple", "noto style, bear")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = tmp_path_factory.mktemp("unet") / "emoji64_unet.safetensors"
    assemble.assemble_unet(path)
    with torch.inference_mode():
        found = comfy.sd.load_checkpoint_guess_config(str(path))
    path.unlink()
    return found


def test_comfyui_loads_it_as_sd15_and_samples_what_the_study_samples(loaded):
    import comfy.sample

    model, clip, vae, _ = loaded
    assert type(model.model.model_config).__name__ == "SD15"
    assert model.model.model_type.name == "EPS"
    with torch.inference_mode():
        texts = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in PROMPTS]
        own = unet.context(Text(), list(PROMPTS))
        for text, expected in zip(texts, own, strict=True):
            torch.testing.assert_close(text[0][0][0], expected, rtol=1e-3, atol=1e-3)
        empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        latent = torch.zeros(1, 4, 8, 8)
        noise = comfy.sample.prepare_noise(latent, 0)
        made = comfy.sample.sample(
            model, noise, 20, 3.0, "euler", "normal", texts[0], empty, latent, seed=0
        )
        expected = unet.sample(list(PROMPTS[:1]), 0, 20, 3.0) / unet.SCALE
        assert (made - expected).norm() < 1e-2 * expected.norm()
        pictures = vae.decode(made).movedim(-1, 1)
        own_pictures = unet.load_vae().decode(made)
        torch.testing.assert_close(pictures, own_pictures, rtol=0, atol=1e-2)
    white = pictures[0, :, :4, :4].mean()
    assert white > 0.9  # emoji are drawn on white


def test_it_trains(loaded, sara):
    model, clip, _, _ = loaded
    with torch.inference_mode():
        captions = [clip.encode_from_tokens_scheduled(clip.tokenize(p))[0] for p in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(1, 4, 8, 8, generator=generator) for _ in PROMPTS]
    before = bits(model)
    options = settings(sara, steps=3, batch_size=2, learning_rate=1e-3, fraction=0.1)
    delta, losses = train(sara, model, latents, captions, options)
    assert len(losses) == 3
    assert any(len(entry.shape) == 4 for entry in delta.entries.values())  # convolutions
    assert_same_bits(before, model)
