"""The guidance value that models which take one are trained at."""

import pytest
import torch

from . import zoo
from .builders import pairs


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    import comfy.sd

    path = tmp_path_factory.mktemp("models") / "video.safetensors"
    zoo.write("HunyuanVideo", path)
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path))


def given(sara, patcher, latents, captions, guidance):
    """What the model is given for each caption."""
    with sara.host.trainable(patcher, None) as calls:
        calls.guidance = guidance
        prepared = [calls.prepare_latent(latent) for latent in latents]
        encoded = calls.encode_captions(captions, prepared)
    return [cond["guidance"].cond.tolist() if "guidance" in cond else None for cond in encoded]


def test_captions_without_one_take_the_runs_and_others_keep_theirs(distilled, sara):
    latents, captions = zoo.examples("HunyuanVideo", 2)
    captions[1][1]["guidance"] = 3.0
    assert given(sara, distilled, latents, captions, 1.0) == [[1.0], [3.0]]
    assert given(sara, distilled, latents, captions, None) == [[6.0], [3.0]]  # ComfyUI's own
    assert "guidance" not in captions[0][1]


def test_models_that_take_none_are_given_none(sd15, sara):
    assert given(sara, sd15, *pairs(1), 1.0) == [None]


@pytest.mark.parametrize(("setting", "value"), [(1.0, 1.0), (4.5, 4.5), (-1.0, 6.0)])
def test_the_setting_reaches_the_model(distilled, sara, setting, value):
    latents, captions = zoo.examples("HunyuanVideo", 2)
    examples = sara.examples.Examples(latents, captions)
    settings = sara.settings.RunSettings(steps=1, guidance=setting)
    with sara.run.prepared(distilled, examples, settings) as (calls, training):
        seen = [cond["guidance"].cond.item() for own in training.task._captions for cond in own]
    assert seen == [value] * 2
