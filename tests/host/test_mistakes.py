"""What is likely not meant is refused, or said before the first step and kept to be seen."""

import dataclasses
import types

import comfy.supported_models
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingSD3

from .builders import pairs, settings


def mistakes(sara, patcher, options, *examples):
    from sara_pack.nodes.training.advice import likely_mistakes

    given = sara.examples.Examples(*examples)
    return likely_mistakes(patcher, options, given, options.batch_size)


def test_nothing_is_said_of_a_sound_training(sd15, sara):
    latents, captions = pairs(6)
    _, (empty,) = pairs(1, seed=9)
    options = settings(sara, steps=300, batch_size=4)
    assert mistakes(sara, sd15, options, latents, captions, empty) == []


@pytest.mark.parametrize(
    ("changes", "alter", "message"),
    [
        ({}, lambda captions, empty: ([empty] * 6, empty), "no picture has a caption"),
        ({}, lambda captions, empty: (captions[:1] * 6, empty), "the same caption"),
        (
            {"batch_size": 8, "steps": 200},
            lambda *given: given,
            "batch_size is 8, but there are 6 pictures",
        ),
        ({"steps": 1000}, lambda *given: given, "1000 steps go 333 times over the pictures"),
        ({}, lambda captions, empty: (captions, None), "caption_dropout has no effect"),
    ],
)
def test_each_likely_mistake_is_said(sd15, sara, changes, alter, message):
    latents, captions = pairs(6)
    _, (empty,) = pairs(1, seed=9)
    captions, empty = alter(captions, empty)
    options = settings(sara, **{"steps": 300, "batch_size": 2, **changes})
    (line,) = mistakes(sara, sd15, options, latents, captions, empty)
    assert message in line


def test_regularisation_pictures_are_not_counted(sd15, sara):
    latents, captions = pairs(6)
    options = settings(sara, batch_size=4, steps=8, caption_dropout=0.0)
    (line,) = mistakes(sara, sd15, options, latents, captions, None, None, None, 3)
    assert "batch_size is 4, but there are 3 pictures" in line


def of_family(name, **config):
    """A MODEL of which only the family is looked at, in ComfyUI's own configuration of it."""
    family = getattr(comfy.supported_models, name)(config)
    return types.SimpleNamespace(model=types.SimpleNamespace(model_config=family))


def test_families_are_known_by_comfyuis_own_configurations(sd15, emoji64, sara):
    assert sara.host.trained_side(sd15) == 512
    assert sara.host.trained_side(emoji64) == 1024  # taken for SD3
    expected = {"SDXL": 1024, "Flux": 1024, "QwenImage": 1328, "WAN22_T2V": 640, "SVD_img2vid": 768}
    assert {n: sara.host.trained_side(of_family(n)) for n in expected} == expected
    distilled = of_family("Flux", guidance_embed=True), of_family("FluxSchnell")
    assert all(map(sara.host.is_guidance_distilled, distilled))
    assert not sara.host.is_guidance_distilled(of_family("Flux", guidance_embed=False))
    assert not sara.host.is_guidance_distilled(sd15)


def test_another_prediction_is_refused_unless_it_is_meant_and_stays_marked(
    sd15, sara, tmp_path, monkeypatch
):
    output = tmp_path / "output"
    monkeypatch.setattr(sara.host, "output_root", lambda: str(output))
    options = settings(sara, steps=2, learning_rate=1e-4, output_name="run")
    (flow,) = ModelSamplingSD3().patch(sd15, 3.0)
    with pytest.raises(ValueError, match="set to flow prediction.*is one for epsilon prediction"):
        sara.folders.new_folder(flow, options)
    assert not output.exists()  # nothing is left behind
    sara.folders.new_folder(sd15, options).close()

    (velocity,) = ModelSamplingDiscrete().patch(sd15, "v_prediction", False)
    meant = dataclasses.replace(options, allow_other_prediction=True)
    latents, captions = pairs(2)
    path, _, chart = sara.run.run(
        velocity,
        sara.examples.Examples(latents, captions),
        sara.folders.new_folder(velocity, meant),
        "1",
    )
    marks = [line for line in chart["warnings"] if "prediction" in line]
    assert marks == ["trained for v prediction; the checkpoint is for epsilon"]
    delta = sara.core.SparseDelta.load(path)
    assert delta.metadata["sara.other_prediction"] == "v instead of epsilon"
    # The run's own setting counts when it is resumed, not that of a fresh node.
    sara.folders.old_folder(velocity, path.parent.name, options, 0).close()


def test_previews_without_a_latent_have_the_models_own_size(sd15, sara):
    latent = sara.host.families.empty_latent(sd15, 8)
    assert latent.shape == (1, 4, 64, 64)
    assert torch.count_nonzero(latent) == 0


def test_noise_levels_that_are_no_range_are_refused_before_anything_runs(sara):
    from sara_pack.nodes.training.train import SaraTrain

    def check(lowest, highest):
        return SaraTrain.validate_inputs(["new run"], ["fp32"], [lowest], [highest])

    assert check(0.2, 0.8) is True
    assert check(None, 0.1) is True  # linked
    assert "expected the lowest below the highest" in check(0.8, 0.2)
    assert "highest_noise is 1.5" in check(0.0, 1.5)
