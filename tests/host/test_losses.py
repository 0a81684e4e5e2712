"""Noise, losses and calls in this process, against ComfyUI's own model classes."""

import math

import pytest
import torch

from sara_core.training.noise_levels import NoiseLevels

from .builders import pairs, raw_output


def test_loads_as_the_family_it_stands_for(sd15, emoji64, sara):
    assert sara.host.architecture(sd15) == "SD15"
    assert 21e6 < sum(p.numel() for p in sd15.model.diffusion_model.parameters()) < 26e6
    assert sara.host.architecture(emoji64) == "SD3"


def test_epsilon_loss_is_the_error_of_the_predicted_noise(sd15, sara):
    latents, captions = pairs(3)
    with sara.host.trainable(sd15, None) as calls, torch.no_grad():
        data = sara.sets.TrainingSet(calls, sara.examples.Examples(latents, captions))
        assert calls.schedule.prediction == "epsilon"
        clean = data.latents([0, 1, 2])
        scale = sd15.model.latent_format.scale_factor
        assert torch.allclose(clean, torch.cat(latents) * scale)
        sigma = calls.schedule.draw_sigma(3, torch.Generator().manual_seed(0))
        table = sd15.model.model_sampling.sigmas
        assert all((table == s).any() for s in sigma)
        noise = torch.randn(clean.shape)
        noisy = calls.schedule.add_noise(clean, noise, sigma)
        x0, out = raw_output(
            calls.model.diffusion_model, lambda: data.predict(noisy, sigma, [0, 1, 2], [False] * 3)
        )
        loss = calls.schedule.loss(x0, clean, sigma)
    expected = (out - noise).square().flatten(1).mean(1)
    assert torch.allclose(loss, expected, rtol=1e-3)


def test_flow_loss_is_the_error_of_the_velocity_at_the_models_shift(emoji64, sara):
    latents, captions = pairs(2, 16, 8, 4096, pooled=2048)
    with sara.host.trainable(emoji64, None) as calls, torch.no_grad():
        data = sara.sets.TrainingSet(calls, sara.examples.Examples(latents, captions))
        assert (calls.schedule.prediction, calls.schedule.distribution) == ("flow", "logit_normal")
        t = torch.sigmoid(torch.randn(2, generator=torch.Generator().manual_seed(1)))
        sigma = calls.schedule.draw_sigma(2, torch.Generator().manual_seed(1))
        assert torch.allclose(sigma, 3 * t / (1 + 2 * t))  # SD3's shift of 3
        clean = data.latents([0, 1])
        noise = torch.randn(clean.shape)
        noisy = calls.schedule.add_noise(clean, noise, sigma)
        x0, out = raw_output(
            calls.model.diffusion_model, lambda: data.predict(noisy, sigma, [0, 1], [False] * 2)
        )
        loss = calls.schedule.loss(x0, clean, sigma)
    expected = (out - (noise - clean)).square().flatten(1).mean(1)
    assert torch.allclose(loss, expected, rtol=1e-3)


def test_noise_is_mixed_as_comfyui_does(sd15, emoji64, sara):
    for patcher, channels in ((sd15, 4), (emoji64, 16)):
        schedule = sara.host.noise_schedule(patcher)
        latents, noise = torch.randn(2, 2, channels, 4, 4)
        sigma = schedule.draw_sigma(2, torch.Generator().manual_seed(0))
        expected = patcher.model.model_sampling.noise_scaling(sigma, noise.clone(), latents)
        assert torch.allclose(schedule.add_noise(latents, noise, sigma), expected)


@pytest.mark.parametrize(
    ("base", "table", "prediction", "distribution"),
    [
        ("V_PREDICTION", "ModelSamplingDiscrete", "v", "uniform"),
        ("EDM", "ModelSamplingContinuousEDM", "edm", "log_normal"),
        ("X0", "ModelSamplingDiscrete", "x0", "uniform"),
        ("CONST", "ModelSamplingFlux", "flow", "logit_normal"),
        ("COSMOS_RFLOW", "ModelSamplingCosmosRFlow", "cosmos_flow", "logit_normal"),
    ],
)
def test_every_parametrisation_agrees_with_comfyuis_denoiser(
    sd15, sara, base, table, prediction, distribution
):
    import comfy.model_sampling as sampling

    kind = type("Sampling", (getattr(sampling, table), getattr(sampling, base)), {})
    patcher = sd15.clone()
    patcher.add_object_patch("model_sampling", kind())
    schedule = sara.host.noise_schedule(patcher)
    assert (schedule.prediction, schedule.distribution) == (prediction, distribution)
    model_sampling = patcher.get_model_object("model_sampling")
    sigma = schedule.draw_sigma(6, torch.Generator().manual_seed(0))
    assert (sigma > 0).all()
    latents, noise, out, other = torch.randn(4, 6, 4, 3, 3, dtype=torch.float64)
    noisy = schedule.add_noise(latents, noise, sigma)
    expected = model_sampling.noise_scaling(sigma, noise.clone(), latents)
    assert torch.allclose(noisy, expected)
    # Two outputs that differ by d give losses as if d were the error of the prediction itself.
    x0 = model_sampling.calculate_denoised(sigma, out, noisy)
    near = model_sampling.calculate_denoised(sigma, other, noisy)
    found = schedule.loss(near, x0, sigma)
    assert torch.allclose(found.double(), (other - out).square().flatten(1).mean(1), rtol=1e-3)
    for levels in ("family", "uniform", "logit_normal"):
        sigma = NoiseLevels(schedule, levels, lowest=0.25, highest=0.5).draw(
            500, torch.Generator().manual_seed(1)
        )
        share = {  # of noise, as the model is told it
            "ModelSamplingDiscrete": lambda s: model_sampling.timestep(s) / 1000,
            "ModelSamplingContinuousEDM": lambda s: (
                (s.log() - math.log(model_sampling.sigma_min))
                / math.log(model_sampling.sigma_max / model_sampling.sigma_min)
            ),
            "ModelSamplingFlux": lambda s: model_sampling.timestep(s),
            "ModelSamplingCosmosRFlow": lambda s: s / (s + 1),
        }[table](sigma)
        assert 0.249 < share.min() < 0.3
        assert 0.45 < share.max() < 0.501


def test_a_sampling_that_cannot_be_trained_is_refused(sd15, sara):
    import comfy.model_sampling as sampling

    kind = type("Sampling", (sampling.ModelSamplingDiscrete, sampling.IMG_TO_IMG), {})
    patcher = sd15.clone()
    patcher.add_object_patch("model_sampling", kind())
    with pytest.raises(ValueError, match="IMG_TO_IMG.* cannot be trained"):
        sara.host.noise_schedule(patcher)


def test_a_batch_is_each_picture_with_its_own_caption_and_noise_level(sd15, sara):
    latents, captions = pairs(3)
    captions[1] = pairs(1, length=154, seed=5)[1][0]  # a longer caption in the same batch
    empty = pairs(1, seed=9)[1][0]
    with sara.host.trainable(sd15, None) as calls, torch.no_grad():
        data = sara.sets.TrainingSet(calls, sara.examples.Examples(latents, captions, empty))
        clean, sigma = data.latents([0, 1, 2]), torch.tensor([0.5, 2.0, 8.0])
        together = data.predict(clean, sigma, [0, 1, 2], [0, 0, None])
        model = calls.model
        chosen = [captions[0], captions[1], empty]
        for i, (context, _) in enumerate(chosen):
            alone = model.apply_model(
                clean[i : i + 1], sigma[i : i + 1], c_crossattn=context.clone(),
                transformer_options={},
            )  # fmt: skip
            assert torch.allclose(together[i : i + 1], alone, atol=1e-4), i


def test_each_of_several_captions_reaches_the_model(sd15, sara):
    latents, captions = pairs(2)
    lines = pairs(3, seed=7)[1]
    carried = [captions[0][0], {**captions[0][1], "sara_captions": lines}]
    batch = [{"samples": latent} for latent in latents]
    examples = sara.examples.gather_examples(
        batch, [[carried], [captions[1]]], None, None, None, None
    )
    assert [list(options) for _, options in examples.captions] == [[], []]
    plain = sara.examples.gather_examples(batch, [[c] for c in captions], None, None, None, None)
    with sara.host.trainable(sd15, None) as calls, torch.no_grad():
        data = sara.sets.TrainingSet(calls, examples)
        assert data.captions_to_learn(0) == range(1, 4)
        assert data.captions_to_learn(1) == range(1)
        clean, sigma = data.latents([0]), torch.tensor([2.0])
        for number, (context, _) in enumerate([captions[0], *lines]):
            alone = calls.model.apply_model(
                clean, sigma, c_crossattn=context.clone(), transformer_options={}
            )
            assert torch.allclose(data.predict(clean, sigma, [0], [number]), alone, atol=1e-4)
        saved, now = (
            {
                "model": 0,
                "held out": 0,
                "sampling": 0,
                "patches": "",
                **sara.examples.describe_examples(e),
            }
            for e in (examples, plain)
        )
    assert sara.examples.differences(saved, saved) == []
    assert "there are 4 latents, embeddings and masks, the run had 7" in str(
        sara.examples.differences(saved, now)
    )


def test_what_later_nodes_add_to_a_caption_counts_for_all_of_its_captions(sara):
    """As FluxGuidance and ReferenceLatent do, which know nothing of captions to draw from."""
    latents, captions = pairs(2, pooled=8)
    drawn = pairs(2, pooled=8, seed=3)[1]
    drawn[1][1]["guidance"] = 2.0
    carried = [captions[0][0], {**captions[0][1], "sara_captions": drawn, "guidance": 3.5}]
    batch = [{"samples": latent} for latent in latents]
    examples = sara.examples.gather_examples(batch, [[carried]] * 2, None, None, None, None)
    found = examples.drawn[0]
    assert [pair[1]["guidance"] for pair in found] == [3.5, 2.0]
    assert [pair[0] is own[0] for pair, own in zip(found, drawn, strict=True)] == [True, True]
    assert found[0][1]["pooled_output"] is drawn[0][1]["pooled_output"]
    assert "guidance" not in drawn[0][1]
    assert len(examples.different_drawn) == 2  # shared by both pictures


def test_captions_to_draw_from_that_are_not_finite_are_refused(sara):
    from sara_pack.nodes.training.unlearnable import refuse_unlearnable

    latents, captions = pairs(2)
    broken = [captions[0][0] * float("nan"), {}]
    carried = [captions[1][0], {"sara_captions": [captions[0], broken]}]
    batch = [{"samples": latent} for latent in latents]
    examples = sara.examples.gather_examples(
        batch, [[captions[0]], [carried]], None, None, None, None
    )
    with pytest.raises(ValueError, match="the captions of picture 2 hold NaN"):
        refuse_unlearnable(examples)


def test_masks_reach_the_loss_at_the_latents_size(sd15, sara):
    latents, captions = pairs(3)
    masks = [torch.zeros(1, 64, 64), torch.ones(1, 8, 8), torch.rand(1, 16, 16)]
    masks[0][:, :32] = 1
    with sara.host.trainable(sd15, None) as calls:
        pictures = sara.sets.TrainingSet(
            calls, sara.examples.Examples(latents, captions, masks=masks)
        )
        mask = pictures.mask([0, 1, 2])
    assert mask.shape == (3, 1, 8, 8)
    assert torch.equal(mask[0, 0], torch.tensor([[1.0] * 8] * 4 + [[0.0] * 8] * 4))
    assert torch.equal(mask[1, 0], torch.ones(8, 8))
    by_hand = masks[2][0].reshape(8, 2, 8, 2).mean((1, 3))
    assert torch.allclose(mask[2, 0], by_hand)
    with pytest.raises(ValueError, match="3 pictures but 2 masks"):
        sara.examples.flatten_masks(masks[:2], 3)


def test_memory_is_measured_with_the_longest_caption_to_draw_from(sd15, sara, monkeypatch):
    latents, captions = pairs(2)
    (long,) = pairs(1, length=154, seed=5)[1]
    carried = [captions[0][0], {**captions[0][1], "sara_captions": [captions[0], long]}]
    batch = [{"samples": latent} for latent in latents]
    examples = sara.examples.gather_examples(
        batch, [[carried], [captions[1]]], None, None, None, None
    )
    with sara.host.trainable(sd15, None) as calls:
        data = sara.sets.TrainingSet(calls, examples)
        assert [data.longest_caption(picture) for picture in (0, 1)] == [2, 0]
        asked = []
        predict = data.predict

        def seen(noisy, sigma, pictures, numbers):
            asked.append(list(zip(pictures, numbers, strict=True)))
            return predict(noisy, sigma, pictures, numbers)

        monkeypatch.setattr(data, "predict", seen)
        options = sara.settings.RunSettings(steps=2, batch_size=2, fraction=0.05)
        optimizer = sara.core.SaraAdamW(calls.model.diffusion_model, **options.optimizer_options)
        training = sara.run.TrainingRun(optimizer, data, options)
        assert training.rehearse(2) > 0
        assert asked == [[(0, 2), (1, 0)]]
        optimizer.restore()
