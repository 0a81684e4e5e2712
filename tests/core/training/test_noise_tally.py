"""Mean losses by noise level, against sums by hand."""

import math

import pytest
import torch

from sara_core.training.noise_tally import FEW, KEPT, NoiseTally
from sara_core.training.objective import NoiseSchedule

FLOW = NoiseSchedule("flow", "logit_normal", lambda t: 3 * t / (1 + 2 * t))
TABLE = torch.linspace(0.03, 14.6, 1000)
EPSILON = NoiseSchedule("epsilon", "uniform", lambda t: TABLE[(t * 1000).long()])


def test_a_flow_goes_by_sigma_and_others_by_the_place_among_the_timesteps():
    for schedule, sigma in (
        (FLOW, torch.tensor([0.05, 0.55, 0.99])),
        (EPSILON, TABLE[torch.tensor([50, 550, 999])]),
    ):
        tally = NoiseTally(schedule)
        tally.note(sigma[:1], torch.tensor([1.0]))
        tally.note(sigma[1:], torch.tensor([2.0, 3.0]))
        tally.count()
        means = tally.means()
        assert {i: pair for i, pair in enumerate(means) if pair != [None, None]} == {
            0: [1.0, 1.0], 5: [2.0, 2.0], 9: [3.0, 3.0],
        }  # fmt: skip


def test_first_and_recent_means_are_those_by_hand():
    tally, losses = NoiseTally(FLOW), [2.0 + i for i in range(3 * FEW)]
    for loss in losses:
        tally.note(torch.tensor([0.31]), torch.tensor([99.0]))
        tally.forget()  # of a step that was retried
        tally.note(torch.tensor([0.31]), torch.tensor([loss]))
        tally.count()
    weights = [KEPT ** (len(losses) - 1 - i) for i in range(len(losses))]
    recent = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert tally.means()[3] == pytest.approx([sum(losses[:FEW]) / FEW, recent], rel=1e-5)


def test_losses_that_are_not_finite_are_left_out():
    tally = NoiseTally(FLOW)
    tally.note(torch.full((3,), 0.5), torch.tensor([1.0, math.nan, math.inf]))
    tally.count()
    assert tally.means()[5] == [1.0, 1.0]
    assert NoiseTally(FLOW).means() == [[None, None]] * 10
