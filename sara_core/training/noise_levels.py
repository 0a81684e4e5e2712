"""Which noise levels a run trains at: those its family was trained at, or others, in all of them or a range."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from .objective import EDM_LOG_MEAN, EDM_LOG_STD, NoiseSchedule

DISTRIBUTIONS = ("family", "uniform", "logit_normal")
NUM_BISECTIONS = 60
BY_SIZE = -1.0  # flow_shift
# Patches (of 2 x 2 latent values) of a picture, and the logarithm of the shift that goes with so many;
# https://github.com/comfyanonymous/ComfyUI/blob/v0.3.75/comfy_extras/nodes_model_advanced.py, ModelSamplingFlux
FEW_PATCHES, SMALL_SHIFT, MANY_PATCHES, LARGE_SHIFT = 256, 0.5, 4096, 1.15


def shift_of(area: int) -> float:
    """Return the timestep shift that goes with latents of so many values a channel and frame.

    Larger pictures need more noise to be hidden as well (Esser et al. 2024, arXiv:2403.03206, section
    5.3.2); this is the line that Flux is sampled by.
    """
    share = (area / 4 - FEW_PATCHES) / (MANY_PATCHES - FEW_PATCHES)
    return math.exp(SMALL_SHIFT + share * (LARGE_SHIFT - SMALL_SHIFT))


def shifted(schedule: NoiseSchedule, flow_shift: float, area: int) -> NoiseSchedule:
    """Return a flow's schedule with another timestep shift than the model's.

    Args:
        schedule: Of the family.
        flow_shift: The shift, above 0; 0 leaves the model's; `BY_SIZE` takes that of `shift_of`.
        area: Values of a channel and frame of the latents.

    Raises:
        ValueError: Not a flow, or a shift that is none.
    """
    if not flow_shift:
        return schedule
    if schedule.prediction != "flow" or (flow_shift < 0 and flow_shift != BY_SIZE):
        raise ValueError(
            f"flow_shift is {flow_shift:g} and the model predicts {schedule.prediction}; expected a flow "
            "model and a shift above 0, or -1 for that of the pictures' size. Set it to 0"
        )
    shift = shift_of(area) if flow_shift == BY_SIZE else flow_shift
    return replace(schedule, to_sigma=lambda t: shift * t / (1 + (shift - 1) * t))


class NoiseLevels:
    """Draws noise levels by a distribution, cut off where a share of noise is too small or too large.

    Args:
        schedule: Of the family.
        distribution: "family" is the schedule's own; "uniform" and "logit_normal" (Esser et al. 2024,
            arXiv:2403.03206, section 3.1) are of the time that the schedule turns into a noise level, so
            that its shift applies to them as well.
        mean: Of the normal distribution of logit_normal; above 0 for more noise.
        std: Its standard deviation, above 0.
        lowest: Least share of noise, in `[0, 1)`: sigma in a flow, else the place among the timesteps.
        highest: Largest share of noise, in `(lowest, 1]`.

    Raises:
        ValueError: No noise level lies in the range.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        distribution: str = "family",
        mean: float = 0.0,
        std: float = 1.0,
        lowest: float = 0.0,
        highest: float = 1.0,
    ):
        self._schedule, self._kind, self._mean, self._std = schedule, distribution, mean, std
        if distribution == "family":
            self._kind, self._mean, self._std = schedule.distribution, 0.0, 1.0
        self._is_own = distribution == "family" and (lowest, highest) == (0.0, 1.0)
        self._start = self._place(schedule.sigma_at(lowest)) if lowest > 0 else 0.0
        self._end = self._place(schedule.sigma_at(highest)) if highest < 1 else 1.0
        if not self._start < self._end:
            raise ValueError(
                f"no noise level lies between lowest_noise {lowest:g} and highest_noise {highest:g}; "
                "widen the range"
            )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw noise levels. Returns sigma, shape `(count,)`, float32, CPU."""
        if self._is_own:
            return self._schedule.draw_sigma(count, generator)
        share = torch.rand(count, generator=generator, dtype=torch.float64)
        return self._sigma(self._start + (self._end - self._start) * share)

    def _sigma(self, share: Tensor) -> Tensor:
        """Return the noise level below which a share of all lies: the inverse of the distribution."""
        if self._kind == "uniform":
            return self._schedule.to_sigma(share.float())
        normal = torch.special.ndtri(share)
        if self._kind == "log_normal":
            return torch.exp(EDM_LOG_MEAN + EDM_LOG_STD * normal).float()
        return self._schedule.to_sigma(torch.sigmoid(self._mean + self._std * normal).float())

    def _place(self, sigma: float) -> float:
        """Return the share of noise levels below sigma, by bisection, as they rise with it."""
        low, high = 0.0, 1.0
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            if float(self._sigma(torch.tensor([middle], dtype=torch.float64))) < sigma:
                low = middle
            else:
                high = middle
        return high
