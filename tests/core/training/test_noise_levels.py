"""Noise levels follow the distribution asked for, within the range asked for."""

import math

import pytest
import torch

from sara_core.training.config import TrainConfig
from sara_core.training.noise_levels import BY_SIZE, NoiseLevels, shift_of, shifted
from sara_core.training.objective import NoiseSchedule
from sara_core.training.passes import Passes

from .small_run import make

COUNT = 40_000
SHIFT = 3.0
TABLE = torch.linspace(0.03, 15.0, 1000)


def flow(time):
    """Shifted as SD3's."""
    return SHIFT * time / (1 + (SHIFT - 1) * time)


def table(time):
    return TABLE[(time * 1000).long().clamp(max=999)]


SCHEDULES = {
    "flow": NoiseSchedule("flow", "logit_normal", flow),
    "epsilon": NoiseSchedule("epsilon", "uniform", table),
    "edm": NoiseSchedule("edm", "log_normal", table),
    "cosmos_flow": NoiseSchedule("cosmos_flow", "logit_normal", lambda t: (t / (1 - t)).clamp(max=80.0)),
}  # fmt: skip


def draw(schedule, *args, **options):
    levels = NoiseLevels(SCHEDULES[schedule], *args, **options)
    return levels.draw(COUNT, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_familys_own_is_what_the_schedule_draws(name):
    own = SCHEDULES[name].draw_sigma(COUNT, torch.Generator().manual_seed(1))
    assert torch.equal(draw(name), own)


def test_uniform_and_logit_normal_are_of_the_time_before_the_shift():
    time = draw("flow", "uniform")
    time = time / (SHIFT - (SHIFT - 1) * time)
    found = time.quantile(torch.tensor([0.1, 0.5, 0.9]))
    assert torch.allclose(found, torch.tensor([0.1, 0.5, 0.9]), atol=0.01)
    time = draw("flow", "logit_normal", -0.8, 0.5)
    logit = torch.logit(time / (SHIFT - (SHIFT - 1) * time))
    assert (logit.mean().item(), logit.std().item()) == pytest.approx((-0.8, 0.5), abs=0.01)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("distribution", ["family", "uniform", "logit_normal"])
def test_a_range_keeps_the_distribution_within_it(name, distribution):
    whole = draw(name, distribution, 0.5, 0.8)
    schedule, share = SCHEDULES[name], (0.2, 0.7)
    low, high = (schedule.sigma_at(end) for end in share)
    kept = whole[(whole >= low) & (whole <= high)]
    found = draw(name, distribution, 0.5, 0.8, *share)
    assert low <= found.min() < found.max() <= high
    places = torch.linspace(0.05, 0.95, 10)
    wide = high - low
    assert torch.allclose(found.quantile(places), kept.quantile(places), atol=0.03 * wide)


def test_a_share_of_noise_is_sigma_in_a_flow_and_else_a_place_among_the_timesteps():
    assert SCHEDULES["flow"].sigma_at(0.875) == 0.875
    assert SCHEDULES["epsilon"].sigma_at(0.5) == TABLE[500].item()
    assert SCHEDULES["cosmos_flow"].sigma_at(0.5) == 1.0


def test_another_shift_takes_the_place_of_the_models():
    own = shifted(SCHEDULES["flow"], 5.0, 64)
    assert own.to_sigma(torch.tensor([0.5])).item() == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))
    assert shifted(SCHEDULES["epsilon"], 0.0, 64) is SCHEDULES["epsilon"]
    with pytest.raises(ValueError, match="flow_shift is 3 and the model predicts epsilon"):
        shifted(SCHEDULES["epsilon"], 3.0, 64)
    with pytest.raises(ValueError, match=r"flow_shift is -0.5; expected -1, or at least 0"):
        TrainConfig(1, flow_shift=-0.5)


@pytest.mark.parametrize(
    ("side", "shift"), [(256, math.exp(0.5)), (1024, math.exp(1.15)), (512, math.exp(0.63))]
)
def test_the_shift_by_size_is_that_flux_is_sampled_by(side, shift):
    area = (side // 8) ** 2  # 512: 1024 patches, a fifth of the way from 256 to 4096
    assert shift_of(area) == pytest.approx(shift, rel=1e-6)
    found = shifted(SCHEDULES["flow"], BY_SIZE, area).to_sigma(torch.tensor([0.25])).item()
    assert found == pytest.approx(shift * 0.25 / (1 + (shift - 1) * 0.25), rel=1e-6)


def test_every_size_is_learned_at_its_own_shift_and_measured_at_the_models():
    _, run = make(flow_shift=BY_SIZE, timestep_distribution="uniform")
    run.task.pictures = [torch.zeros(1, 1, 32, 32)] * 5 + [torch.zeros(1, 1, 128, 128)] * 2
    passes = Passes(run.task, run.config)
    for picture, area in ((0, 32 * 32), (6, 128 * 128)):
        batch = [picture] * 2000
        sigma = passes.draw(batch, torch.Generator().manual_seed(0), to_learn=True)[2]
        shift = shift_of(area)
        assert sigma.median().item() == pytest.approx(shift / (1 + shift), abs=0.02)
    measured = passes.draw([6] * 2000, torch.Generator().manual_seed(0))[2]
    assert measured.median().item() == pytest.approx(0.5, abs=0.02)


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r"no noise level lies between lowest_noise 0.5 and highest_noise 0.5"
    ):
        NoiseLevels(SCHEDULES["epsilon"], lowest=0.5, highest=0.5002)
    with pytest.raises(ValueError, match=r"lowest_noise is 0.7 and highest_noise 0.2"):
        TrainConfig(1, lowest_noise=0.7, highest_noise=0.2)
    with pytest.raises(
        ValueError, match="timestep_distribution is 'normal'; expected one of family"
    ):
        TrainConfig(1, timestep_distribution="normal")
    with pytest.raises(ValueError, match="logit_std is 0"):
        TrainConfig(1, logit_std=0)
