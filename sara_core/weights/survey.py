"""What one look at all weights finds: a histogram of their magnitudes, exact zeros, numbers that are none."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .magnitudes import NON_FINITE_BIN, NUM_BINS, NUM_COARSE_BINS, coarsened, magnitude_histogram

NAMED = 10


@dataclass(frozen=True)
class Survey:
    """Counts over some parameters.

    Args:
        histogram: Sum of their `magnitude_histogram` counts.
        zeros: Exact zeros in each, by name.
        coarse: Counts of each, `coarsened`, by name.
    """

    histogram: Tensor
    zeros: dict[str, int]
    coarse: dict[str, Tensor]

    @property
    def num_weights(self) -> int:
        """Weights in all parameters."""
        return int(self.histogram.sum())

    @property
    def num_zeros(self) -> int:
        """Exact zeros in all parameters."""
        return sum(self.zeros.values())


def survey(
    parameters: Mapping[str, Tensor],
    visit: Callable[[str, Tensor, int], None] = lambda name, histogram, num_zeros: None,
) -> Survey:
    """Look at all weights once, a chunk at a time.

    Args:
        parameters: Weights by name, floating point.
        visit: Told of each one's name, histogram and exact zeros, as only the sum of histograms is kept.

    Raises:
        ValueError: NaN or infinity in a weight.
    """
    histogram = torch.zeros(NUM_BINS, dtype=torch.int64)
    kept = torch.empty((len(parameters), NUM_COARSE_BINS), dtype=torch.int64)  # in one piece
    coarse = dict(zip(parameters, kept, strict=True))
    zeros, broken = {}, []
    for name, weight in parameters.items():
        counts, zeros[name] = magnitude_histogram(weight)
        if num_broken := int(counts[NON_FINITE_BIN:].sum()):
            broken.append(f"{name} ({num_broken})")
        histogram += counts
        coarse[name].copy_(coarsened(counts))
        visit(name, counts, zeros[name])
    if broken:
        more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise ValueError(
            f"the base holds NaN or infinite weights in {', '.join(broken[:NAMED])}{more}; every "
            "loss would be NaN. Load an intact checkpoint"
        )
    return Survey(histogram, zeros, coarse)
