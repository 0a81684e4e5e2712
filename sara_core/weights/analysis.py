"""Look at a model's weights before training: what a threshold would select, and where."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cutoff import Cutoff, parse_count, solve_cutoff
from .magnitudes import NON_FINITE_BIN, bin_edges, count_small
from .survey import Survey

SUGGESTED_COUNTS = ("5M", "20M", "50M")
SUGGESTED_FRACTIONS = (0.01, 0.05, 0.10, 0.20)


@dataclass
class Tally:
    """Counts over a group of parameters: all weights, selected ones, exact zeros."""

    num_weights: int = 0
    num_selected: int = 0
    num_zeros: int = 0

    def add(self, other: "Tally") -> None:
        """Add the counts of another group."""
        self.num_weights += other.num_weights
        self.num_selected += other.num_selected
        self.num_zeros += other.num_zeros


@dataclass
class Analysis:
    """What a threshold selects in a model.

    Args:
        cutoff: The threshold, and whether zeros are skipped.
        survey: The histogram of magnitudes, and exact zeros.
        total: Counts over all parameters.
        blocks: Counts by block of the model, such as "input_blocks.4", in the model's order.
        kinds: Counts by number of dimensions: "matrix", "conv2d", ...
        suggestions: Threshold for each suggested count or share, to about 1 %; those the model is
            too small for are left out.
    """

    cutoff: Cutoff
    survey: Survey
    total: Tally = field(default_factory=Tally)
    blocks: dict[str, Tally] = field(default_factory=dict)
    kinds: dict[str, Tally] = field(default_factory=dict)
    suggestions: dict[str, float] = field(default_factory=dict)


KIND_BY_DIMS = {0: "scalar", 1: "vector", 2: "matrix", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


def analyze(
    parameters: Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    num_trainable: int | str | None = None,
    zeros: str = "auto",
) -> Analysis:
    """Count what a threshold, or the threshold for a budget, selects; a chunk of weights at a time.

    Args and errors are those of `selection.select`; selecting nothing is no error here. For a budget it is the
    least threshold that selects as many, or more where more weights are equally small.
    """
    cutoff, seen = solve_cutoff(
        parameters,
        threshold=threshold,
        fraction=fraction,
        num_trainable=num_trainable,
        zeros=zeros,
    )
    cutoff = cutoff.alone()
    result = Analysis(cutoff, seen, suggestions=_suggestions(seen))
    for name, weight in parameters.items():
        num_zeros = seen.zeros[name]
        num_small = count_small(weight, cutoff.threshold)
        num_selected = num_small - num_zeros if cutoff.skip_zeros else num_small
        tally = Tally(weight.numel(), num_selected, num_zeros)
        kind = KIND_BY_DIMS.get(weight.dim(), f"{weight.dim()}-dimensional")
        for group in (
            result.total,
            result.blocks.setdefault(block_of(name), Tally()),
            result.kinds.setdefault(kind, Tally()),
        ):
            group.add(tally)
    return result


def block_of(name: str) -> str:
    """Return the part of a parameter name up to its first number: "joint_blocks.3"."""
    found = re.match(r"(.*?\.\d+)(?:\.|$)", name)
    return found.group(1) if found else name.split(".")[0]


def _suggestions(seen: Survey) -> dict[str, float]:
    live = seen.num_weights - seen.num_zeros
    wanted = {count: parse_count(count) for count in SUGGESTED_COUNTS}
    wanted |= {f"{share:.0%}": round(share * live) for share in SUGGESTED_FRACTIONS}
    return {label: _interpolate(seen, count) for label, count in wanted.items() if 0 < count < live}


def _interpolate(seen: Survey, count: int) -> float:
    counts = seen.histogram[:NON_FINITE_BIN].double().clone()
    counts[0] -= seen.num_zeros
    cumulative = counts.cumsum(0)
    bin_ = int(torch.searchsorted(cumulative, count))
    low, high = bin_edges()[bin_ : bin_ + 2].tolist()
    before = float(cumulative[bin_] - counts[bin_])
    return low + (high - low) * (count - before) / max(1.0, float(counts[bin_]))
