"""Updates by optimizers that other packages maintain, on flat values of the trained weights.

With weight decay they are given what is learned of each weight, which begins at zero, so that it is that which
is pulled to zero, as by SaRA's own; without, the trained values, so that no base value has to be read.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn

from ..weights.shards import is_sharded
from .sparse_weight import SparseWeight
from .updates import hand_on

ADAMW, PRODIGY, SCHEDULE_FREE = KINDS = ("adamw", "prodigy", "schedule_free")
PACKAGES = {PRODIGY: "prodigyopt", SCHEDULE_FREE: "schedulefree"}
# What Prodigy's authors advise for diffusion models,
# https://github.com/konstmish/prodigy/blob/main/README.md, "Diffusion models"
OPTIONS: dict[str, dict] = {
    PRODIGY: {"safeguard_warmup": True, "use_bias_correction": True},
    SCHEDULE_FREE: {"foreach": False},  # which would take copies of all weights at once
}
BYTES = {PRODIGY: 16, SCHEDULE_FREE: 12}  # kept of a trained weight, an average included


def refuse_unusable(kind: str) -> None:
    """Raise if updates cannot be made in this way.

    Raises:
        ValueError: Not one of `KINDS`.
        ImportError: Its package is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"optimizer={kind!r}; expected one of {', '.join(KINDS)}")
    if kind != ADAMW:
        _found(kind)


def refuse_beside_package(kind: str, **options) -> None:
    """Raise if options are set that only AdamW knows, and another optimizer makes the updates.

    Raises:
        ValueError: Naming the first.
    """
    off = {"moments": "fp32"}
    for name, value in options.items():
        if kind != ADAMW and value and value != off.get(name):
            raise ValueError(
                f"{name} is {value!r}, which is for the optimizer adamw, but optimizer is {kind!r}; leave out "
                "one of them"
            )


def refuse_bad_rates(kind: str, lr: float | None, betas: Sequence[float], eps: float) -> None:
    """Raise at values that a package's optimizer cannot work with, before a model is touched.

    Raises:
        ValueError: Naming the first.
    """
    if kind == PRODIGY and (lr == 0 or eps == 0):
        raise ValueError(f"lr is {lr!r} and eps {eps!r}; Prodigy needs both above 0")
    if kind == SCHEDULE_FREE and betas[0] == 0:
        raise ValueError(f"betas are {betas!r}; schedule-free AdamW needs the first above 0")


def refuse_divided(kind: str, parameters: Mapping[str, Tensor]) -> None:
    """Raise if parameters are divided over processes, which only AdamW's updates can go by.

    Raises:
        ValueError: They are.
    """
    if kind != ADAMW and any(map(is_sharded, parameters.values())):
        raise ValueError(
            f"optimizer is {kind!r}, which cannot go by weights that fully_shard has divided; choose adamw"
        )


def _found(kind: str) -> Callable[..., torch.optim.Optimizer]:
    package = PACKAGES[kind]
    try:
        if kind == PRODIGY:
            from prodigyopt import Prodigy as found
        else:
            from schedulefree import AdamWScheduleFree as found
    except ImportError as error:
        raise ImportError(
            f"the optimizer {kind} needs the package {package}, which cannot be imported ({error}). Install it "
            f"(pip install -U {package}) in the Python that runs this, or choose adamw"
        ) from error
    return found


class PackageUpdates:
    """Updates by a package's optimizer; what it remembers is in SaRA's state, too, and its rates are SaRA's.

    The same calls as `AdamWUpdates`'.

    Args:
        kind: One of `PACKAGES`.
        leaves: Of the trained weights.
        options: Learning rate, betas, eps and weight decay.
    """

    def __init__(self, kind: str, leaves: Sequence[nn.Parameter], options: Mapping):
        self._kind = kind
        self._inner = _found(kind)(leaves, **options, **OPTIONS.get(kind, {}))
        if kind == SCHEDULE_FREE:
            self._inner.train()  # type: ignore[attr-defined]
        self._groups: list[dict] | None = self._inner.param_groups

    def share(self, optimizer: torch.optim.Optimizer) -> None:
        """Work on the state and rates of an optimizer, which at first takes the rates over."""
        if self._groups is not None:
            optimizer.param_groups, self._groups = self._groups, None
        self._inner.state, self._inner.param_groups = optimizer.state, optimizer.param_groups

    @torch.no_grad()
    def update_(self, weights: Sequence[SparseWeight], states, group: dict, num_steps: int) -> None:
        """Update the weights that have a gradient.

        Where the optimizer averages, the average is left as that of the weight, which is then what is learned.
        """
        updated = [weight for weight in weights if weight.gradient is not None]
        decays = bool(group["weight_decay"])
        holders = [weight.leaf.data for weight in updated]
        try:
            for weight in updated:
                weight.leaf.data = weight.trained - _base(weight) if decays else weight.trained
            self._inner.step()
            learned = [weight.leaf.data for weight in updated]
        finally:
            for weight, holder in zip(updated, holders, strict=True):
                weight.leaf.data = holder
        for weight, values in zip(updated, learned, strict=True):
            base = _base(weight) if decays else 0.0
            if self._kind == SCHEDULE_FREE:
                behind = 1 - 1 / group["betas"][0]
                weight.average = values.lerp(states[weight.leaf]["z"], behind) + base
            weight.write_(values + base if decays else values, weight.index)

    def keep(
        self,
        states: MutableMapping[Tensor, dict],
        weight: SparseWeight,
        kept: SparseWeight | None,
        stopped: SparseWeight,
        mark: Tensor,
    ) -> None:
        """Hand on what is remembered; what has stopped does so at its average, not on the way to it."""
        hand_on(states, weight, kept, mark, _part)
        if self._kind == SCHEDULE_FREE and stopped.average is not None:
            stopped.write_(stopped.average, stopped.index)

    def take_over(
        self,
        states: MutableMapping[Tensor, dict],
        weights: Sequence[SparseWeight],
        taken: Sequence[slice],
        saved: Mapping[int, Mapping],
    ) -> None:
        """Take over what was remembered in a saved run."""
        for place, state in saved.items():
            leaf = weights[place].leaf
            states[leaf] = {
                key: value.to(leaf.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }


def _base(weight: SparseWeight) -> Tensor:
    return weight.base.to(weight.dtype)


def _part(state: dict, mark: Tensor) -> dict:
    return {
        key: value[mark] if isinstance(value, Tensor) and value.shape == mark.shape else value
        for key, value in state.items()
    }


def is_sound(state: Mapping, count: int) -> bool:
    """Tell whether a saved state is one of `count` weights."""
    shapes = {tuple(value.shape) for value in state.values() if isinstance(value, Tensor)}
    return (count,) in shapes and shapes <= {(count,), ()}
