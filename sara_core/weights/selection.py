"""Choose the weights that train: the smallest by magnitude, over the whole model or in each parameter."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

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
    small_weight_index,
)
from .shards import total

logger = logging.getLogger("comfyui-sara")

ZEROS = ("auto", "skip", "train")  # how exact zeros are treated
COUNT_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Selection:
    """Which weights of a model train.

    Args:
        threshold: Absolute weight value; weights strictly closer to zero are selected.
        index: Parameter name to sorted flat positions, each shape `(k,)` with `k > 0`, int32 (int64
            for parameters of 2**31 weights or more), on the parameter's device. Positions count
            in row-major order of the parameter's shape, whatever its memory layout. Of a parameter
            that is divided over processes: in this process's part, where `k` may be 0.
        num_considered: Weights in all the parameters looked at.
        num_zeros: Exact zeros among them.
        zeros_skipped: Whether exact zeros were skipped.
        own_thresholds: Threshold of each parameter, in place of the one, where each has its own.
    """

    threshold: float
    index: dict[str, Tensor]
    num_considered: int
    num_zeros: int
    zeros_skipped: bool
    own_thresholds: dict[str, float] = field(default_factory=dict)

    @property
    def num_selected(self) -> int:
        """Number of weights that train, of those held in this process."""
        return sum(len(index) for index in self.index.values())


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
        num_considered: Weights in all the parameters looked at.
        zeros: Exact zeros in each parameter, by name.
        histogram: Sum of the parameters' `magnitude_histogram` counts.
        coarse: Counts of each parameter, `coarsened`, by name.
    """

    threshold: float
    skip_zeros: bool
    num_considered: int
    zeros: dict[str, int]
    histogram: Tensor
    coarse: dict[str, Tensor]

    @property
    def num_zeros(self) -> int:
        """Exact zeros in all parameters."""
        return sum(self.zeros.values())


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
        return Cutoff(threshold, skip, total, zero_counts, histogram, coarse)
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
        logger.warning(
            "%d weights are exactly zero, more than the %d that are to train; all of them train",
            num_zeros, budget,
        )  # fmt: skip
        k = num_zeros
    if k < total:
        threshold = kth_magnitude(parameters, histogram, k)
    else:
        largest = torch.tensor(kth_magnitude(parameters, histogram, total - 1))
        threshold = torch.nextafter(largest, torch.tensor(float("inf"))).item()
    return Cutoff(threshold, skip, total, zero_counts, histogram, coarse)


def select(
    parameters: Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    num_trainable: int | str | None = None,
    zeros: str = "auto",
    by_parameter: bool = False,
) -> Selection:
    """Select the weights that train, over all `parameters` together or the same share of each.

    Exactly one of `threshold`, `fraction` and `num_trainable` is given. For a budget the threshold
    is the smallest magnitude left out, so the count is met exactly; only equal magnitudes at that
    border (common in bfloat16) can make the selection smaller; larger only where more weights are exactly
    zero than are to train and zeros train, as in a base of four bits.

    Exact zeros are ordinary small weights to the paper, but a padded or pruned base has so many
    that they would take the whole budget, and zeros behind dead inputs never get a gradient.

    Args:
        parameters: Weights by name, floating point. Not modified.
        threshold: Absolute weight value, finite and > 0.
        fraction: Share of the weights, in `(0, 1]`; of the non-zero ones where zeros are skipped.
        num_trainable: Number of weights, as `parse_count` reads it.
        zeros: "train" selects exact zeros like any small weight, "skip" never does, "auto" trains
            them unless they would be more than half of the selection.
        by_parameter: Select the smallest of each parameter, by a threshold of its own, instead of the
            smallest of all; takes `fraction`. `Selection.threshold` still is that of all.

    Raises:
        ValueError: Not exactly one rule, another one than `fraction` with `by_parameter`, a value out
            of range, NaN or infinity in a weight, or nothing selected.
    """
    cutoff = solve_cutoff(
        parameters,
        threshold=threshold,
        fraction=fraction,
        num_trainable=num_trainable,
        zeros=zeros,
    )
    own = _own_cutoffs(parameters, cutoff, fraction, zeros) if by_parameter else {}
    cutoffs = own if by_parameter else dict.fromkeys(parameters, cutoff)
    index = {
        name: small_weight_index(parameters[name], found.threshold, found.skip_zeros)
        for name, found in cutoffs.items()
    }
    index = {
        name: positions
        for name, positions in index.items()
        if int(total(parameters[name], torch.tensor(len(positions))))
    }
    if not index:
        skipped = f" ({cutoff.num_zeros} exact zeros were skipped)" if cutoff.skip_zeros else ""
        raise ValueError(
            f"no weight is selected: none of {cutoff.num_considered} has a magnitude below "
            f"{cutoff.threshold:g}{skipped}, so there would be nothing to train. Raise the "
            "threshold or the fraction"
        )
    if cutoff.skip_zeros and zeros == "auto":
        logger.warning(
            "%d of %d weights are exactly zero (padded or pruned); they are not trained, as they "
            "would take most of the selection. Set zeros to 'train' to train them",
            cutoff.num_zeros,
            cutoff.num_considered,
        )
    return Selection(
        cutoff.threshold, index, cutoff.num_considered, cutoff.num_zeros, cutoff.skip_zeros,
        {name: found.threshold for name, found in own.items()},
    )  # fmt: skip


def _own_cutoffs(
    parameters: Mapping[str, Tensor], whole: Cutoff, fraction: float | None, zeros: str
) -> dict[str, Cutoff]:
    """Return a cutoff for each parameter, but those of zeros alone, which are skipped unless they train."""
    if fraction is None:
        raise ValueError("by_parameter takes a share of each parameter; give fraction alone")
    return {
        name: solve_cutoff({name: weight}, fraction=fraction, zeros=zeros)
        for name, weight in parameters.items()
        if zeros == "train" or whole.zeros[name] < weight.numel()
    }


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
