"""Find the magnitude below which a share or number of weights lies, and how exact zeros are treated."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .magnitudes import (
    NON_FINITE_BIN,
    NUM_BINS,
    NUM_COARSE_BINS,
    bin_of,
    coarsened,
    count_small,
    kth_magnitude,
    magnitude_histogram,
)

logger = logging.getLogger("comfyui-sara")

ZEROS = ("auto", "skip", "train")  # how exact zeros are treated
COUNT_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def parse_count(count: int | str) -> int:
    """Read a number of weights such as 5000000, "5M", "0.5B" or "200k".

    Raises:
        ValueError: Not a positive whole number of weights.
    """
    text = str(count).strip().upper().replace("_", "")
    unit = COUNT_UNITS.get(text[-1:], 1)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        value = 0.0
    if not (0 < value < 1e15 and value == int(value)):
        raise ValueError(
            f"number of trainable weights is {count!r}; expected a positive whole number, "
            'as in 5000000, "5M", "200k" or "0.5B"'
        )
    return int(value)


@dataclass(frozen=True)
class Cutoff:
    """A threshold with what was seen on the way to it.

    Args:
        threshold: Absolute weight value; weights strictly closer to zero are selected.
        skip_zeros: Whether exact zeros are skipped.
        budget: Number of weights that was asked for, of those considered; 0 where a threshold was.
        num_considered: Weights in all the parameters looked at.
        zeros: Exact zeros in each parameter, by name.
        histogram: Sum of the parameters' `magnitude_histogram` counts.
        coarse: Counts of each parameter, `coarsened`, by name.
    """

    threshold: float
    skip_zeros: bool
    budget: int
    num_considered: int
    zeros: dict[str, int]
    histogram: Tensor
    coarse: dict[str, Tensor]

    @property
    def num_zeros(self) -> int:
        """Exact zeros in all parameters."""
        return sum(self.zeros.values())

    @property
    def takes_more(self) -> bool:
        """Whether more weights are exactly zero than were asked for, and all of them are selected."""
        return not self.skip_zeros and 0 < self.budget < self.num_zeros


def warn_of_many_zeros(cutoffs: Iterable[Cutoff]) -> None:
    """Say in one line how many zeros are selected beyond what was asked for, if any are."""
    larger = [cutoff for cutoff in cutoffs if cutoff.takes_more]
    if larger:
        logger.warning(
            "%d weights are exactly zero, more than the %d that are to train; all of them train",
            sum(cutoff.num_zeros for cutoff in larger),
            sum(cutoff.budget for cutoff in larger),
        )


def solve_cutoff(
    parameters: Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    num_trainable: int | str | None = None,
    zeros: str = "auto",
) -> Cutoff:
    """Find the threshold that selects as asked; arguments and errors are those of `select`.

    No more than a chunk of the weights is copied at a time.
    """
    _refuse_rules(threshold, fraction, num_trainable, zeros)
    histogram, zero_counts, coarse = _histogram_of_finite(parameters)
    total, num_zeros = int(histogram.sum()), sum(zero_counts.values())
    skip = zeros == "skip"
    if threshold is not None:
        skip = skip or (
            zeros == "auto" and _mostly_zeros(parameters, histogram, num_zeros, threshold)
        )
        return Cutoff(threshold, skip, 0, total, zero_counts, histogram, coarse)
    budget = (
        parse_count(num_trainable or 0) if fraction is None else max(1, round(fraction * total))
    )
    skip = skip or (zeros == "auto" and num_zeros > budget / 2)
    live = total - num_zeros if skip else total
    if fraction is not None:
        budget = min(live, max(1, round(fraction * live)))
    if not 0 < budget <= live:
        raise ValueError(
            f"{budget} weights are to train but the chosen parameters hold only {live}"
            f"{' that are not exactly zero' if skip else ''}; ask for fewer"
        )
    k = total - live + budget
    if not skip and k < num_zeros:  # none of the zeros can be told from the others
        k = num_zeros
    if k < total:
        threshold = kth_magnitude(parameters, histogram, k)
    else:
        largest = torch.tensor(kth_magnitude(parameters, histogram, total - 1))
        threshold = torch.nextafter(largest, torch.tensor(float("inf"))).item()
    return Cutoff(threshold, skip, budget, total, zero_counts, histogram, coarse)


def _refuse_rules(threshold, fraction, num_trainable, zeros) -> None:
    rules = {"threshold": threshold, "fraction": fraction, "num_trainable": num_trainable}
    given = [name for name, value in rules.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of threshold, fraction and num_trainable; got {given}")
    if zeros not in ZEROS:
        raise ValueError(f"zeros={zeros!r}; expected one of {', '.join(ZEROS)}")
    if threshold is not None and not 0 < threshold < float("inf"):
        raise ValueError(f"threshold is {threshold!r}; expected a finite number above 0")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction!r}; expected a number above 0 and at most 1")


def _mostly_zeros(
    parameters: Mapping[str, Tensor], histogram: Tensor, num_zeros: int, threshold: float
) -> bool:
    surely_below = int(histogram[: bin_of(threshold)].sum())
    if num_zeros <= surely_below / 2:
        return False
    return num_zeros > sum(count_small(weight, threshold) for weight in parameters.values()) / 2


def _histogram_of_finite(
    parameters: Mapping[str, Tensor],
) -> tuple[Tensor, dict[str, int], dict[str, Tensor]]:
    total = torch.zeros(NUM_BINS, dtype=torch.int64)
    kept = torch.empty((len(parameters), NUM_COARSE_BINS), dtype=torch.int64)  # in one piece
    coarse = dict(zip(parameters, kept, strict=True))
    zeros, broken = {}, []
    for name, weight in parameters.items():
        counts, zeros[name] = magnitude_histogram(weight)
        if int(counts[NON_FINITE_BIN:].sum()):
            broken.append(f"{name} ({int(counts[NON_FINITE_BIN:].sum())})")
        total += counts
        coarse[name].copy_(coarsened(counts))
    if broken:
        more = f" and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise ValueError(
            f"the base holds NaN or infinite weights in {', '.join(broken[:10])}{more}; every "
            "loss would be NaN. Load an intact checkpoint"
        )
    return total, zeros, coarse
