"""AdamW's update of the selected weights, as many in one go as memory should hold copies of."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..weights.shards import held, is_sharded
from . import adam_moments
from .sparse_weight import SparseWeight

BATCH_ON_CPU, BATCH = 1 << 19, 1 << 23  # trained values updated in one go


def refuse_bad_options(betas: Sequence[float], **values: float) -> None:
    """Raise if decay rates are not in `[0, 1)`, or other values not finite numbers from 0 on.

    Raises:
        ValueError: Naming the first that is not.
    """
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value!r}; expected a finite number of at least 0")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas!r}; expected two numbers in [0, 1)")


def clip_(leaves: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a norm over all of them, those divided over processes included.

    Args:
        leaves: Their gradients are changed in place.
        max_norm: The largest that is left as it is.

    Returns:
        The norm they had, shape `()`.
    """
    groups: dict[object, list[nn.Parameter]] = {}
    for leaf in leaves:  # torch takes no norm over both kinds
        groups.setdefault(getattr(leaf, "device_mesh", None), []).append(leaf)
    if len(groups) == 1:
        norm = nn.utils.clip_grad_norm_(leaves, max_norm)
        return norm.full_tensor() if is_sharded(norm) else norm  # type: ignore[attr-defined]
    norms = [
        nn.utils.get_total_norm([leaf.grad for leaf in group if leaf.grad is not None])
        for group in groups.values()
    ]
    whole = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]  # type: ignore[attr-defined]
    total_norm = torch.linalg.vector_norm(torch.stack([n.to(whole[0].device) for n in whole]))
    factor = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)  # as torch does it
    for leaf in leaves:
        if leaf.grad is not None:
            held(leaf.grad).mul_(factor.to(leaf.device))
    return total_norm


def hand_on(
    states: MutableMapping[Tensor, dict],
    weight: SparseWeight,
    kept: SparseWeight | None,
    mark: Tensor,
    part: Callable[[dict, Tensor], dict],
) -> None:
    """Give what remains of a weight its part of what is remembered; see `AdamWUpdates.keep`."""
    state = states.pop(weight.leaf, None)
    if kept is not None and state:
        states[kept.leaf] = part(state, mark)


def _part(state: dict, mark: Tensor) -> dict:
    return {"step": state["step"], **adam_moments.part(state, mark)}


class AdamWUpdates:
    """Updates by torch's AdamW; what it remembers of each weight is in the optimizer's state, by leaf.

    Args:
        moments: How moments are kept, one of `adam_moments.KINDS`.
        rates: Factors of the learning rate other than 1, by parameter name.
    """

    def __init__(self, moments: str, rates: Mapping[str, float]):
        self._moments, self._rates = moments, rates

    def share(self, optimizer: torch.optim.Optimizer) -> None:
        """Work on what an optimizer holds; this is given it with each call."""

    def update_(
        self,
        weights: Sequence[SparseWeight],
        states: MutableMapping[Tensor, dict],
        group: dict,
        num_steps: int,
    ) -> None:
        """Update the weights that have a gradient.

        Args:
            weights: Changed in place.
            states: Moments and number of steps by leaf; made here for a weight's first update.
            group: Learning rate, betas, eps and weight decay.
            num_steps: Updates made so far in the run.
        """
        gradients = [(weight, weight.gradient) for weight in weights]
        updated = [weight for weight, gradient in gradients if gradient is not None]
        for weight, gradient in gradients:
            if gradient is not None and not states[weight.leaf]:
                states[weight.leaf]["step"] = torch.zeros((), dtype=torch.float32)
                states[weight.leaf].update(adam_moments.zeros(gradient, self._moments))
        by_rate: dict[float, list[SparseWeight]] = {}
        for weight in updated:
            by_rate.setdefault(self._rates.get(weight.name, 1.0), []).append(weight)
        for rate, alike in by_rate.items():
            own = {**group, "lr": group["lr"] * rate}
            for batch in _batches(alike):
                _update_batch(batch, [states[weight.leaf] for weight in batch], own, num_steps)

    def keep(
        self,
        states: MutableMapping[Tensor, dict],
        weight: SparseWeight,
        kept: SparseWeight | None,
        stopped: SparseWeight,
        mark: Tensor,
    ) -> None:
        """Hand on what is remembered of a weight to the part of it that goes on.

        Args:
            states: By leaf; changed in place.
            weight: As it was.
            kept: What goes on of it, None for nothing.
            stopped: What has stopped of it.
            mark: Which of its selected values go on, bool `(k,)`.
        """
        hand_on(states, weight, kept, mark, _part)

    def take_over(
        self,
        states: MutableMapping[Tensor, dict],
        weights: Sequence[SparseWeight],
        taken: Sequence[slice],
        saved: Mapping[int, Mapping],
    ) -> None:
        """Take over what was remembered in a saved run; torch itself would make floats of codes.

        Args:
            states: By leaf; changed in place.
            weights: In the order of the saved run.
            taken: Which of the saved run's values each weight has.
            saved: Moments and number of steps by place in that order.
        """
        for i, state in saved.items():
            leaf = weights[i].leaf
            moments = adam_moments.restored(state, leaf, self._moments, taken[i])
            states[leaf] = {"step": state["step"].to("cpu", copy=True), **moments}


def moments_of_all(states: dict[int, dict], weights: Sequence[SparseWeight]) -> dict[int, dict]:
    """Return moments as `take_over` reads them, of all parts of weights that are divided.

    Those in eight bits become floats there, as blocks of them end where a part does.

    Args:
        states: By place of the weight.
        weights: In this order.
    """
    whole = {}
    for i, state in states.items():
        shard = weights[i].shard
        whole[i] = state
        if shard.is_part:
            moments = adam_moments.floats(state)
            gathered = {key: shard.whole(moment)[0].cpu() for key, moment in moments.items()}
            whole[i] = {"step": state["step"], **gathered}
    return whole


def _update_batch(
    batch: list[SparseWeight], states: list[dict], group: dict, num_steps: int
) -> None:
    positions = [weight.index_to_write() for weight in batch]
    if group["weight_decay"]:
        for weight, index in zip(batch, positions, strict=True):
            weight.decay_(group["lr"] * group["weight_decay"], index)
    targets = [weight.update_target() for weight in batch]
    with adam_moments.opened(states, num_steps) as (exp_avgs, exp_avg_sqs):
        adamw(
            targets,
            [gradient for weight in batch if (gradient := weight.gradient) is not None],
            exp_avgs,
            exp_avg_sqs,
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
    for weight, target, index in zip(batch, targets, positions, strict=True):
        weight.take_update_(target, index)


def _batches(weights: list[SparseWeight]) -> Iterator[list[SparseWeight]]:
    """Yield weights in groups that are updated in one go; bounds the copies of trained values."""
    batch: list[SparseWeight] = []
    size = 0
    for weight in weights:
        limit = BATCH_ON_CPU if weight.leaf.device.type == "cpu" else BATCH
        if batch and size + len(weight) > limit:
            yield batch
            batch, size = [], 0
        batch.append(weight)
        size += len(weight)
    if batch:
        yield batch
