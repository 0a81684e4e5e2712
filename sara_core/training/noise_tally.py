"""Mean losses by noise level, kept where the losses are, so that nothing waits for them."""

import torch
from torch import Tensor

from .objective import NoiseSchedule

NUM_LEVELS = 10
FEW = 16  # losses of a level that make up its mean at first
KEPT = 0.99  # of what is recent, from step to step


class NoiseTally:
    """Sums losses up by the share of noise, those of a run's beginning and the recent ones apart.

    Args:
        schedule: Of the family; levels are tenths of its noise, see `NoiseSchedule.sigma_at`.
    """

    def __init__(self, schedule: NoiseSchedule):
        inner = [schedule.sigma_at(level / NUM_LEVELS) for level in range(1, NUM_LEVELS)]
        self._edges = torch.tensor(inner, dtype=torch.float32)
        self._first = self._recent = torch.zeros(2, NUM_LEVELS)  # sums, and how many they are of
        self._noted: list[tuple[Tensor, Tensor]] = []

    def note(self, sigma: Tensor, losses: Tensor) -> None:
        """Note losses `(B,)` at noise levels `(B,)`, of a step that may still be retried."""
        self._noted.append((sigma, losses.detach()))

    def forget(self) -> None:
        """Leave out what was noted, as it counts for nothing."""
        self._noted = []

    @torch.no_grad()
    def count(self) -> None:
        """Take in what was noted, of a whole step; losses that are not finite are left out."""
        if not self._noted:
            return
        sigma, losses = (torch.cat(parts) for parts in zip(*self._noted, strict=True))
        self._noted = []
        device = losses.device
        self._edges = self._edges.to(device)
        self._first, self._recent = self._first.to(device), self._recent.to(device)
        level = torch.bucketize(sigma.float(), self._edges, right=True)
        counts = losses.isfinite().float()
        rows = torch.stack([losses.float().nan_to_num(0, 0, 0), counts])
        added = torch.zeros_like(self._recent).index_add_(1, level, rows)
        self._recent = self._recent * KEPT + added
        self._first = self._first + added * (self._first[1] < FEW)

    def means(self) -> list[list[float | None]]:
        """Return the mean at first and the recent one of each level, from little noise to much; None for none."""
        sums, counts = torch.stack([self._first, self._recent], 1).tolist()
        return [
            [total / count if count else None for total, count in zip(*level, strict=True)]
            for level in zip(zip(*sums, strict=True), zip(*counts, strict=True), strict=True)
        ]
