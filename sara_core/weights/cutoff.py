"""Find the magnitude below which a share or number of weights lies, and how exact zeros are treated."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .magnitudes import Level, bin_of, count_small, counts_within, level_at, place_of
from .survey import Survey, survey

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
    """A threshold for some weights, and what it does.

    Args:
        threshold: Absolute weight value; weights strictly closer to zero are selected.
        skip_zeros: Whether exact zeros are skipped.
        budget: Number of weights that was asked for, 0 where a threshold was.
        takes_more: Number of equal ones, the smallest, that are all selected although fewer were asked for.
    """

    threshold: float
    skip_zeros: bool
    budget: int = 0
    takes_more: int = 0


def warn_of_more(cutoffs: Iterable[Cutoff]) -> None:
    """Say in one line how many weights are selected beyond what was asked for, if any are."""
    larger = [cutoff for cutoff in cutoffs if cutoff.takes_more]
    if larger:
        logger.warning(
            "%d of the smallest weights are equal, as exact zeros are, and more than the %d that are to "
            "train; all of them train",
            sum(cutoff.takes_more for cutoff in larger),
            sum(cutoff.budget for cutoff in larger),
        )


def solve_cutoff(
    parameters: Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    num_trainable: int | str | None = None,
    zeros: str = "auto",
) -> tuple[Cutoff, Survey]:
    """Find the threshold that selects as asked from all parameters together.

    Arguments and errors are those of `select`. No more than a chunk of the weights is copied at a time.
    """
    _refuse_rules(threshold, fraction, num_trainable, zeros)
    seen = survey(parameters)
    if threshold is not None:
        skip = zeros == "skip" or (zeros == "auto" and _mostly_zeros(parameters, seen, threshold))
        return Cutoff(threshold, skip), seen
    rank = _Rank.of(seen.num_weights, seen.num_zeros, fraction, num_trainable, zeros)
    place = place_of(seen.histogram, rank.place)
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for weight in parameters.values():
        counts += counts_within(weight, [place.bin])[0]
    return rank.cutoff(level_at(place, counts)), seen


def solve_each(
    parameters: Mapping[str, Tensor], fraction: float, zeros: str = "auto"
) -> tuple[Cutoff, Survey, dict[str, Cutoff]]:
    """Find a threshold for each parameter that selects a share of it, and the one for all together.

    Where many weights of a parameter are equal, as in a base of eight bits, the number that comes
    nearest to the share is selected. Parameters of zeros alone have no threshold unless zeros train.

    Arguments and errors are those of `select`. The weights are looked at as often as for one threshold.
    """
    _refuse_rules(None, fraction, None, zeros)
    ranks, places = {}, {}

    def visit(name: str, histogram: Tensor, num_zeros: int) -> None:
        num_weights = int(histogram.sum())
        if num_weights > num_zeros or (num_weights and zeros == "train"):
            ranks[name] = _Rank.of(num_weights, num_zeros, fraction, None, zeros)
            places[name] = place_of(histogram, ranks[name].place)

    seen = survey(parameters, visit)
    rank = _Rank.of(seen.num_weights, seen.num_zeros, fraction, None, zeros)
    place = place_of(seen.histogram, rank.place)
    every, own = torch.zeros(1 << 16, dtype=torch.int64), {}
    for name, weight in parameters.items():
        bins = [place.bin, *({places[name].bin} if name in places else ())]
        counts = counts_within(weight, bins)
        every += counts[0]
        if name in places:
            level = level_at(places[name], counts[1])
            own[name] = ranks[name].cutoff(level, is_nearest=True)
    return rank.cutoff(level_at(place, every)), seen, own


@dataclass(frozen=True)
class _Rank:
    """How many of the smallest weights are below the threshold.

    Args:
        k: Number of weights below the threshold, skipped zeros among them.
        num_weights: Of how many.
        num_zeros: Exact zeros among them.
        skip_zeros: Whether they are skipped.
        budget: Number that was asked for.
    """

    k: int
    num_weights: int
    num_zeros: int
    skip_zeros: bool
    budget: int

    @classmethod
    def of(cls, num_weights, num_zeros, fraction, num_trainable, zeros) -> "_Rank":
        if fraction is None:
            budget = parse_count(num_trainable or 0)
        else:
            budget = max(1, round(fraction * num_weights))
        skip = zeros == "skip" or (zeros == "auto" and num_zeros > budget / 2)
        live = num_weights - num_zeros if skip else num_weights
        if fraction is not None:
            budget = min(live, max(1, round(fraction * live)))
        if not 0 < budget <= live:
            raise ValueError(
                f"{budget} weights are to train but the chosen parameters hold only {live}"
                f"{' that are not exactly zero' if skip else ''}; ask for fewer"
            )
        k = num_weights - live + budget
        if not skip and k < num_zeros:  # none of the zeros can be told from the others
            k = num_zeros
        return cls(k, num_weights, num_zeros, skip, budget)

    @property
    def place(self) -> int:
        """Rank of the smallest weight above the threshold, or of the largest if there is none."""
        return min(self.k, self.num_weights - 1)

    def cutoff(self, border: Level, is_nearest: bool = False) -> Cutoff:
        """Return the threshold at a border, or just above it if that selects all, or comes nearer to the budget."""
        skipped = self.num_zeros if self.skip_zeros else 0
        below, up_to = border.below - skipped, border.up_to - skipped
        is_above = self.k == self.num_weights
        takes_more = self.num_zeros if not skipped and self.budget < self.num_zeros else 0
        if is_nearest and border.below < self.k:
            alone = not below and up_to <= (self.num_weights - skipped) / 2
            is_above = is_above or alone or up_to - self.budget < self.budget - below
            takes_more = takes_more or (up_to if is_above and not below else 0)
        threshold = torch.tensor(border.magnitude)
        if is_above:
            threshold = torch.nextafter(threshold, torch.tensor(float("inf")))
        return Cutoff(threshold.item(), self.skip_zeros, self.budget, takes_more)


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
