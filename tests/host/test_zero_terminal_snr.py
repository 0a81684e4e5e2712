"""Bases whose last timestep is noise alone (Lin et al. 2023, arXiv:2305.08891), predicted as velocity."""

import math

import pytest
import torch

from sara_core.training.noise_levels import NoiseLevels

from .builders import pairs, raw_output, settings
from .test_end_of_a_run import run

LAST_ALPHA_BAR = 4.8973451890853435e-08  # in place of 0, in ComfyUI's schedule


def alphas_bar_by_hand():
    """Algorithm 1 of the paper, over Stable Diffusion's betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    roots = torch.cumprod(1 - betas, 0).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return torch.cat([roots[:-1] ** 2, torch.tensor([LAST_ALPHA_BAR], dtype=torch.float64)])


@pytest.fixture
def ztsnr(sd15):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(sd15, "v_prediction", zsnr=True)[0]


def test_noise_levels_reach_the_last_one(ztsnr, sara):
    schedule = sara.host.noise_schedule(ztsnr)
    assert (schedule.prediction, schedule.distribution) == ("v", "uniform")
    alphas_bar = alphas_bar_by_hand()
    expected = ((1 - alphas_bar) / alphas_bar).sqrt().float()
    found = schedule.to_sigma((torch.arange(1000) + 0.5) / 1000)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    drawn = NoiseLevels(schedule).draw(20_000, torch.Generator().manual_seed(0))
    assert drawn.max() == found[-1] > 4000
    assert 5 <= (drawn == found[-1]).sum() <= 45  # one in a thousand


def test_the_loss_is_the_error_of_the_velocity_also_where_there_is_noise_alone(ztsnr, sara):
    latents, captions = pairs(4)
    steps = torch.tensor([0, 500, 998, 999])
    alphas_bar = alphas_bar_by_hand()[steps].float().view(-1, 1, 1, 1)
    with sara.host.trainable(ztsnr, None) as calls, torch.no_grad():
        data = sara.sets.TrainingSet(calls, sara.examples.Examples(latents, captions))
        clean = data.latents([0, 1, 2, 3])
        sigma = calls.schedule.to_sigma((steps + 0.5) / 1000)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
        noisy = calls.schedule.add_noise(clean, noise, sigma)
        x0, out = raw_output(
            calls.model.diffusion_model,
            lambda: data.predict(noisy, sigma, [0, 1, 2, 3], [0] * 4),
        )
        loss = calls.schedule.loss(x0, clean, sigma)
        weights = calls.schedule.weight(sigma, "min_snr", 5.0)
    velocity = alphas_bar.sqrt() * noise - (1 - alphas_bar).sqrt() * clean
    expected = (out - velocity).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    snr = (alphas_bar / (1 - alphas_bar)).flatten()
    torch.testing.assert_close(weights, snr.clamp(max=5) / (snr + 1), rtol=1e-2, atol=0)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "debiased"])
def test_a_run_at_high_noise_alone_learns(ztsnr, sara, tmp_path, weighting):
    options = settings(
        sara, steps=4, allow_other_prediction=True, lowest_noise=0.998, loss_weighting=weighting,
        learning_rate=1e-3,
    )  # fmt: skip
    path, losses, chart = run(sara, ztsnr, tmp_path, options)
    assert all(map(math.isfinite, losses["loss"]))
    changes = [e.values for e in sara.core.SparseDelta.load(path).entries.values()]
    assert any(values.abs().max() > 0 for values in changes)
    means = chart["by_noise"]
    assert means[:9] == [[None, None]] * 9
    assert all(map(math.isfinite, means[9]))
