"""Find the magnitude below which a share or number of weights lies, and how exact zeros are treated."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .magnitudes import (
    EqualPart,
    Place,
    bin_edge,
    bin_of,
    count_small,
    counts_within,
    level_at,
    place_of,
)
from .survey import Survey, survey

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
    """A threshold for some weights, and what it selects.

    Args:
        threshold: Absolute weight value; weights strictly closer to zero are selected.
        skip_zeros: Whether exact zeros are not, or only those of `equal`.
        equal: Weights that are selected as well, so that as many are as were asked for: of those at the
            threshold, or of exact zeros where fewer are to train than there are.
        limit: What trained weights are below as long as they count as small: the threshold; above the
            magnitude of `equal`; and no less than what as many weights that aren't zero lie below as
            zeros train, as next to those any other is large.
    """

    threshold: float
    skip_zeros: bool
    equal: EqualPart | None
    limit: float

    @property
    def takes_zeros(self) -> bool:
        """Whether exact zeros are selected, or some of them."""
        return not self.skip_zeros or (self.equal is not None and self.equal.magnitude == 0)

    def alone(self) -> "Cutoff":
        """Return what a threshold without a part of equal weights selects, the least that is not less."""
        if self.equal is None:
            return self
        threshold = self.limit if self.equal.magnitude else self.threshold
        return Cutoff(threshold, not self.takes_zeros, None, threshold)


def solve_cutoff(
    parameters: Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    num_trainable: int | str | None = None,
    zeros: str = "auto",
) -> tuple[Cutoff, Survey]:
    """Find the threshold that selects as asked from all parameters together.

    Arguments and errors are those of `select`. Of a contiguous weight no more than a chunk is copied at a time.
    """
    _refuse_rules(threshold, fraction, num_trainable, zeros)
    seen = survey(parameters)
    if threshold is not None:
        skip = zeros == "skip" or (zeros == "auto" and _mostly_zeros(parameters, seen, threshold))
        return Cutoff(threshold, skip, None, threshold), seen
    rank = _Rank.of(seen.histogram, seen.num_zeros, fraction, num_trainable, zeros)
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for weight in parameters.values():
        counts += counts_within(weight, [rank.border.bin])[0]
    return rank.cutoff(counts), seen


def solve_each(
    parameters: Mapping[str, Tensor], fraction: float, zeros: str = "auto"
) -> tuple[Cutoff, Survey, dict[str, Cutoff]]:
    """Find a threshold for each parameter that selects a share of it, and the one for all together.

    Parameters of zeros alone have no threshold unless zeros train.

    Arguments and errors are those of `select`. The weights are looked at as often as for one threshold.
    """
    _refuse_rules(None, fraction, None, zeros)
    ranks: dict[str, _Rank] = {}

    def visit(name: str, histogram: Tensor, num_zeros: int) -> None:
        num_weights = int(histogram.sum())
        if num_weights > num_zeros or (num_weights and zeros == "train"):
            ranks[name] = _Rank.of(histogram, num_zeros, fraction, None, zeros)

    seen = survey(parameters, visit)
    rank = _Rank.of(seen.histogram, seen.num_zeros, fraction, None, zeros)
    every, own = torch.zeros(1 << 16, dtype=torch.int64), {}
    for name, weight in parameters.items():
        ranks_here = [rank, *([ranks[name]] if name in ranks else ())]
        counts = counts_within(weight, [each.border.bin for each in ranks_here])
        every += counts[0]
        if name in ranks:
            own[name] = ranks[name].cutoff(counts[1])
    return rank.cutoff(every), seen, own


@dataclass(frozen=True)
class _Rank:
    """How many of the smallest weights are to be selected.

    Args:
        k: Number of weights below the threshold, skipped zeros among them.
        num_weights: Of how many.
        num_zeros: Exact zeros among them.
        skip_zeros: Whether they are skipped.
        budget: Number to be selected.
        border: Where the smallest weight above the threshold lies, or the largest if there is none.
        least: See `Cutoff.limit`: what as many weights that aren't zero lie below as zeros train.
    """

    k: int
    num_weights: int
    num_zeros: int
    skip_zeros: bool
    budget: int
    border: Place
    least: float

    @classmethod
    def of(
        cls,
        histogram: Tensor,
        num_zeros: int,
        fraction: float | None,
        num_trainable: int | str | None,
        zeros: str,
    ) -> "_Rank":
        """Decide whether zeros are skipped, and count."""
        num_weights = int(histogram.sum())
        wanted = max(1, round((fraction or 0) * num_weights))
        budget = wanted if fraction is not None else parse_count(num_trainable or 0)
        skip = zeros == "skip" or (zeros == "auto" and num_zeros > budget / 2)
        live = num_weights - num_zeros if skip else num_weights
        if not live:
            raise ValueError(
                f"all of the {num_weights} weights to select from are exactly zero. Set zeros to 'train' to "
                "train them, or load another checkpoint"
                if num_weights
                else "there are no weights to select from"
            )
        if fraction is not None:
            budget = min(live, max(1, round(fraction * live)))
        if not 0 < budget <= live:
            raise ValueError(
                f"{budget} weights are to train but the chosen parameters hold only {live}"
                f"{' that are not exactly zero' if skip else ''}; ask for fewer"
            )
        k = num_weights - live + budget
        first_left_out = num_zeros if not skip and budget < num_zeros else k
        border = place_of(histogram, min(first_left_out, num_weights - 1))
        least = 0.0 if skip else _beyond_zeros(histogram, num_weights, num_zeros, budget)
        return cls(k, num_weights, num_zeros, skip, budget, border, least)

    def cutoff(self, counts: Tensor) -> Cutoff:
        """Return the threshold, the magnitude at `border`, or just above it if all are selected.

        Args:
            counts: The `counts_within` the bin of `border`.
        """
        border = level_at(self.border, counts)
        threshold = border.magnitude
        if self.k == self.num_weights or threshold == 0:
            threshold = torch.nextafter(torch.tensor(threshold), torch.tensor(torch.inf)).item()
        if not self.skip_zeros and self.budget < self.num_zeros:
            equal = EqualPart(0.0, self.budget, self.num_zeros)
            return Cutoff(threshold, True, equal, max(threshold, self.least))
        if not border.below < self.k < self.num_weights:
            return Cutoff(threshold, self.skip_zeros, None, max(threshold, self.least))
        equal = EqualPart(border.magnitude, self.k - border.below, border.up_to - border.below)
        return Cutoff(threshold, self.skip_zeros, equal, max(border.above, self.least))


def _beyond_zeros(histogram: Tensor, num_weights: int, num_zeros: int, budget: int) -> float:
    if num_zeros == num_weights:
        return torch.finfo(torch.float32).max
    rank = min(num_zeros + min(budget, num_zeros), num_weights - 1)
    return bin_edge(max(1, place_of(histogram, rank).bin)) if num_zeros else 0.0


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


def _mostly_zeros(parameters: Mapping[str, Tensor], seen: Survey, threshold: float) -> bool:
    surely_below = int(seen.histogram[: bin_of(threshold)].sum())
    if seen.num_zeros <= surely_below / 2:
        return False
    selected = sum(count_small(weight, threshold) for weight in parameters.values())
    return seen.num_zeros > selected / 2
