"""Which noise levels a run trains at: those its family was trained at, or others, in all of them or a range."""

import torch
from torch import Tensor

from .objective import EDM_LOG_MEAN, EDM_LOG_STD, NoiseSchedule

DISTRIBUTIONS = ("family", "uniform", "logit_normal")
NUM_BISECTIONS = 60


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
