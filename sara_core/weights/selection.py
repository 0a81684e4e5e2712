"""Choose the weights that train: the smallest by magnitude, over the whole model or in each parameter."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cutoff import Cutoff, solve_cutoff, solve_each, warn_of_more
from .magnitudes import small_weight_index
from .shards import total
from .survey import NAMED, Survey

logger = logging.getLogger("comfyui-sara")


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


def select(
    parameters: Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    num_trainable: int | str | None = None,
    zeros: str = "auto",
    by_parameter: bool | None = None,
) -> Selection:
    """Select the weights that train: the smallest share of each parameter, or of all `parameters` together.

    Exactly one of `threshold`, `fraction` and `num_trainable` is given. For a budget the threshold
    is the smallest magnitude left out, so the count is met exactly, but for equal magnitudes at that
    border (common in bfloat16). Of all parameters together they are left out; of each parameter, they are
    taken if that comes nearer to its share. More are selected where more weights are exactly
    zero than are to train and zeros train, as in a base of four bits.

    Exact zeros are ordinary small weights to the paper, but a padded or pruned base has so many
    that they would take the whole budget, and zeros behind dead inputs never get a gradient.

    Args:
        parameters: Weights by name, floating point. Not modified.
        threshold: Absolute weight value, finite and > 0.
        fraction: Share of the weights, in `(0, 1]`; of the non-zero ones where zeros are skipped.
        num_trainable: Number of weights, as `parse_count` reads it.
        zeros: "train" selects exact zeros like any small weight, "skip" never does, "auto" trains
            them unless they would be more than half of the selection, of a parameter's own
            with `by_parameter`.
        by_parameter: Select the smallest of each parameter, by a threshold of its own, instead of the
            smallest of all, as the paper does; by default where a `fraction` is given, which it needs.
            `Selection.threshold` still is that of all.

    Raises:
        ValueError: Not exactly one rule, another one than `fraction` with `by_parameter`, a value out
            of range, NaN or infinity in a weight, or nothing selected.
    """
    is_share = fraction is not None and threshold is None and num_trainable is None
    if by_parameter and not is_share:
        raise ValueError("by_parameter takes a share of each parameter; give fraction alone")
    if by_parameter is None:
        by_parameter = is_share
    own: dict[str, Cutoff] = {}
    if by_parameter:
        whole, seen, own = solve_each(parameters, fraction or 0.0, zeros)
    else:
        whole, seen = solve_cutoff(
            parameters,
            threshold=threshold,
            fraction=fraction,
            num_trainable=num_trainable,
            zeros=zeros,
        )
    cutoffs = own if by_parameter else dict.fromkeys(parameters, whole)
    index = _positions(parameters, cutoffs)
    skipped = sum(
        count
        for name, count in seen.zeros.items()
        if name not in cutoffs or cutoffs[name].skip_zeros
    )
    if not index:
        raise ValueError(_why_nothing(whole, seen, skipped, by_parameter))
    if skipped and zeros == "auto":
        logger.warning(
            "%d of %d weights are exactly zero (padded or pruned) and not trained, as they would take "
            "most of the selection%s. Set zeros to 'train' to train them",
            skipped, seen.num_weights, " in their layers" if by_parameter else "",
        )  # fmt: skip
    warn_of_more(own.values() if by_parameter else [whole])
    _tell_of_left_out([name for name in own if name not in index])
    thresholds = {name: cutoff.threshold for name, cutoff in own.items()}
    return Selection(
        whole.threshold, index, seen.num_weights, seen.num_zeros, skipped > 0, thresholds
    )


def _positions(
    parameters: Mapping[str, Tensor], cutoffs: Mapping[str, Cutoff]
) -> dict[str, Tensor]:
    """Return where each parameter has weights to train; those in which no process has any are left out."""
    index = {
        name: small_weight_index(parameters[name], cutoff.threshold, cutoff.skip_zeros)
        for name, cutoff in cutoffs.items()
    }
    return {
        name: positions
        for name, positions in index.items()
        if int(total(parameters[name], torch.tensor(len(positions))))
    }


def _why_nothing(whole: Cutoff, seen: Survey, skipped: int, by_parameter: bool) -> str:
    also = f" ({skipped} exact zeros were skipped)" if skipped else ""
    if by_parameter:
        return (
            f"no weight is selected: none of {seen.num_weights} can be told from most others of its "
            f"layer{also}, so there would be nothing to train. Raise the fraction"
        )
    return (
        f"no weight is selected: none of {seen.num_weights} has a magnitude below "
        f"{whole.threshold:g}{also}, so there would be nothing to train. Raise the "
        "threshold or the fraction"
    )


def _tell_of_left_out(names: list[str]) -> None:
    if names:
        logger.warning(
            "%d layers do not train, as too many of their weights are equal: %s%s",
            len(names), ", ".join(names[:NAMED]), ", ..." if len(names) > NAMED else "",
        )  # fmt: skip
