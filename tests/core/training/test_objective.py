import math

import pytest
import torch

from sara_core.training.objective import DISTRIBUTIONS, LOSSES, PREDICTIONS, NoiseSchedule

SD = 0.7


def schedule(prediction, distribution="uniform", to_sigma=lambda t: t):
    return NoiseSchedule(prediction, distribution, to_sigma, SD)


def prediction_and_x0(prediction, latents, noise, sigma, guess):
    """Return the training target, and the x0 that a wrong output `guess` stands for, by hand."""
    if prediction == "epsilon":  # x = x0 + s n; x0 = x - s out
        return noise, latents + sigma * noise - sigma * guess
    if prediction == "flow":  # x = (1 - s) x0 + s n; target n - x0; x0 = x - s out
        return noise - latents, (1 - sigma) * latents + sigma * noise - sigma * guess
    x = latents + sigma * noise
    if prediction == "cosmos_flow":  # t = s / (1 + s); x / (1 + s) is the flow's input
        t = sigma / (1 + sigma)
        return noise - latents, x * (1 - t) - t * guess
    skip, out = SD**2 / (sigma**2 + SD**2), sigma * SD / (sigma**2 + SD**2).sqrt()
    sign = -1 if prediction == "v" else 1
    return (latents - skip * x) / (sign * out), skip * x + sign * out * guess


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("prediction", [p for p in PREDICTIONS if p != "x0"])
def test_loss_is_the_error_of_the_prediction_itself(prediction, kind):
    torch.manual_seed(0)
    latents, noise, guess = torch.randn(3, 5, 4, 4, 2, dtype=torch.float64)
    sigma = torch.tensor([0.05, 0.3, 0.6, 0.8, 0.99], dtype=torch.float64)
    s = sigma.view(-1, 1, 1, 1)
    target, x0 = prediction_and_x0(prediction, latents, noise, s, guess)
    expected = LOSSES[kind](guess, target, reduction="none").flatten(1).mean(1)
    found = schedule(prediction).loss(x0, latents, sigma, kind)
    assert torch.allclose(found.double(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("prediction", "min_snr", "debiased"),  # at signal to noise ratios of 16, 4 and 1/4
    [
        ("epsilon", [5 / 16, 1.0, 1.0], [1 / 4, 1 / 2, 2.0]),
        ("v", [5 / 17, 4 / 5, 1 / 5], [4 / 17, 2 / 5, 1 / 2 / (5 / 4)]),
        ("x0", [5.0, 4.0, 0.25], [4.0, 2.0, 0.5]),
    ],
)
def test_weights_are_those_of_the_papers(prediction, min_snr, debiased):
    sigma = torch.tensor([0.25, 0.5, 2.0], dtype=torch.float64)
    plain = NoiseSchedule(prediction, "uniform", lambda t: t)
    assert plain.weight(sigma, "min_snr").tolist() == pytest.approx(min_snr)
    assert plain.weight(sigma, "debiased").tolist() == pytest.approx(debiased)
    assert plain.weight(sigma, "none").tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="weighting is 'p2'; expected one of none, min_snr"):
        plain.weight(sigma, "p2")


def test_the_weight_of_a_flows_middle_is_the_papers_density():
    sigma = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    expected = [2 / math.pi, 3.2 / math.pi, 4 / math.pi, 2 / math.pi]
    assert schedule("flow").weight(sigma, "cosmap").tolist() == pytest.approx(expected)
    middle = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert schedule("flow").weight(middle, "cosmap").mean().item() == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="for flow models, but the model predicts epsilon"):
        schedule("epsilon").weight(sigma, "cosmap")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_count_the_same_error_in_x0_the_same_in_every_family(prediction):
    ratio = torch.tensor([9.0, 1.0, 0.04], dtype=torch.float64)  # signal to noise, squared
    noise = 1 / ratio.sqrt()
    sigma = {"flow": noise / (1 + noise), "edm": SD * noise, "v": SD * noise}.get(prediction, noise)
    found = schedule(prediction)
    if prediction in ("edm", "v"):
        assert torch.allclose(found.snr(sigma), ratio)
    weight = found.weight(sigma, "min_snr", 2.0) * found.error_scale(sigma) ** 2
    assert torch.allclose(weight, found.snr(sigma).clamp(max=2.0))


def test_x0_models_are_compared_as_they_are():
    x0, latents = torch.zeros(2, 3), torch.full((2, 3), 2.0)
    assert schedule("x0").loss(x0, latents, torch.tensor([0.1, 9.0])).tolist() == [4.0, 4.0]


def test_noise_is_mixed_per_sample():
    latents, noise = torch.full((2, 1, 1, 1), 10.0), torch.ones(2, 1, 1, 1)
    sigma = torch.tensor([0.25, 0.5])
    assert schedule("flow").add_noise(latents, noise, sigma).flatten().tolist() == [7.75, 5.5]
    assert schedule("epsilon").add_noise(latents, noise, sigma).flatten().tolist() == [10.25, 10.5]


def test_timesteps_follow_their_distributions():
    generator = torch.Generator().manual_seed(0)
    state = torch.get_rng_state()
    uniform = schedule("epsilon").draw_sigma(50_000, generator)
    assert torch.allclose(
        uniform.quantile(torch.tensor([0.1, 0.5, 0.9])), torch.tensor([0.1, 0.5, 0.9]), atol=0.01
    )
    logit = schedule("flow", "logit_normal").draw_sigma(50_000, generator)
    assert torch.logit(logit).mean().abs() < 0.02
    assert torch.logit(logit).std() == pytest.approx(1.0, abs=0.02)
    edm = schedule("edm", "log_normal").draw_sigma(50_000, generator).log()
    assert (edm.mean().item(), edm.std().item()) == pytest.approx((-1.2, 1.2), abs=0.03)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(DISTRIBUTIONS) == {"uniform", "logit_normal", "log_normal"}


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match="'noise'; expected one of .*epsilon"):
        schedule("noise")
    with pytest.raises(ValueError, match="'normal'; expected one of .*uniform"):
        schedule("v", "normal")
    with pytest.raises(ValueError, match="'l3'; expected one of mse"):
        schedule("v").loss(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), "l3")
