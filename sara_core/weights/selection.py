"""Choose the weights that train: the smallest by magnitude, over the whole model or in each parameter."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cutoff import Cutoff, solve_cutoff, solve_each
from .magnitudes import count_equal, selected_index
from .shards import held, is_sharded, of_parts, total

logger = logging.getLogger("comfyui-sara")


@dataclass(frozen=True)
class Selection:
    """Which weights of a model train.

    Args:
        threshold: Absolute weight value; weights strictly closer to zero are selected (of equal ones, a part
            where all would be too many), unless each parameter has a threshold of its own. Infinity where
            they were chosen by something else than size.
        index: Parameter name to sorted flat positions, each shape `(k,)` with `k > 0`, int32 (int64
            for parameters of 2**31 weights or more), on the parameter's device. Positions count
            in row-major order of the parameter's shape, whatever its memory layout. Of a parameter
            that is divided over processes: in this process's part, where `k` may be 0.
        num_considered: Weights in all the parameters looked at.
        num_zeros: Exact zeros among them.
        zeros_skipped: Whether exact zeros were skipped.
        own_thresholds: Threshold of each parameter, in place of the one, where each has its own.
        weight_rates: Codes of factors of the learning rate, see `optimizer.weight_rates`, uint8 of the shape of
            a parameter's positions, by its name; none for a factor of 1.
    """

    threshold: float
    index: dict[str, Tensor]
    num_considered: int
    num_zeros: int
    zeros_skipped: bool
    own_thresholds: dict[str, float] = field(default_factory=dict)
    weight_rates: dict[str, Tensor] = field(default_factory=dict)

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
    is the smallest magnitude of which none is taken. The count is met exactly: of equal magnitudes at that border (common in
    bfloat16), and of exact zeros where there are more than are to train, an evenly spread part is taken.

    Exact zeros are ordinary small weights to the paper, but a padded or pruned base has so many
    that they would take the whole budget, and zeros behind dead inputs never get a gradient.

    Args:
        parameters: Weights by name, floating point. Not modified.
        threshold: Absolute weight value, finite and > 0.
        fraction: Share of the weights, in `(0, 1]`, of each parameter at least one weight; of the non-zero
            ones where zeros are skipped.
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
    index = _positions(parameters, cutoffs, not by_parameter)
    skipped = sum(
        count
        for name, count in seen.zeros.items()
        if name not in cutoffs or not cutoffs[name].takes_zeros
    )
    if not index:
        also = f" ({skipped} exact zeros were skipped)" if skipped else ""
        raise ValueError(
            f"no weight is selected: none of {seen.num_weights} has a magnitude below "
            f"{whole.threshold:g}{also}, so there would be nothing to train. Raise the threshold"
        )
    if skipped and zeros == "auto":
        _warn_of_skipped(skipped, seen.num_weights, by_parameter)
    thresholds = {name: cutoff.limit for name, cutoff in own.items()}
    return Selection(whole.limit, index, seen.num_weights, seen.num_zeros, skipped > 0, thresholds)


def refuse_unfitting(
    selection: Selection, parameters: Mapping[str, Tensor], **rule: float | str | bool | None
) -> None:
    """Refuse a selection that was made for other parameters, or beside another rule.

    Raises:
        ValueError: It was.
    """
    if given := [name for name, value in rule.items() if value is not None]:
        raise ValueError(
            f"a selection says by itself which weights train; leave out {', '.join(given)}"
        )
    unknown = sorted(selection.index.keys() - parameters.keys())
    wrong = [
        name
        for name, index in selection.index.items()
        if name in parameters and not _is_sound(index, parameters[name])
    ]
    if unknown or wrong or not selection.index:
        raise ValueError(
            f"the selection does not fit the model: it names {len(unknown)} parameters that are not to "
            f"train here, such as {unknown[:3]}, and has no ascending positions within {wrong[:3]}; make it "
            "for this model, with the same include and exclude"
        )
    odd = [
        name
        for name, rates in selection.weight_rates.items()
        if rates.dtype != torch.uint8 or rates.shape != selection.index.get(name, rates[:0]).shape
    ]
    if odd:
        raise ValueError(
            f"the selection's weight_rates do not fit its positions in {odd[:3]}; expected a uint8 code each"
        )


def _is_sound(index: Tensor, parameter: Tensor) -> bool:
    if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
        return False
    if not len(index):  # as where others hold the parts in which positions lie
        return is_sharded(parameter)
    ascends = bool((index.long().diff() > 0).all())
    return ascends and int(index[0]) >= 0 and int(index[-1]) < held(parameter).numel()


def _warn_of_skipped(skipped: int, num_weights: int, by_parameter: bool) -> None:
    logger.warning(
        "%d of %d weights are exactly zero (padded, pruned or rounded) and not trained, as they would take "
        "most of the selection%s. Set zeros to 'train' to train them",
        skipped, num_weights, " in their layers" if by_parameter else "",
    )  # fmt: skip


def _positions(
    parameters: Mapping[str, Tensor], cutoffs: Mapping[str, Cutoff], is_one: bool
) -> dict[str, Tensor]:
    """Return where each parameter has weights to train; those in which no process has any are left out.

    Args:
        parameters: Weights by name.
        cutoffs: Theirs.
        is_one: Whether they are one cutoff, for all together.
    """
    index, end = {}, 0
    for name, cutoff in cutoffs.items():
        weight, first, equal = parameters[name], end if is_one else 0, cutoff.equal
        before, count = 0, 0
        if equal is not None and is_sharded(weight):
            before, count = of_parts(weight, count_equal(weight, equal.magnitude))
        index[name], last = selected_index(
            weight, cutoff.threshold, cutoff.skip_zeros, equal, first + before
        )
        end = first + count if is_sharded(weight) else last
    return {
        name: positions
        for name, positions in index.items()
        if int(total(parameters[name], torch.tensor(len(positions))))
    }
