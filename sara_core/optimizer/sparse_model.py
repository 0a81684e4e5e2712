"""The selected weights of a whole model, and the model's way there and back."""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..delta.delta_file import DeltaEntry
from ..weights.quantised import Quantised, learned_on
from ..weights.shards import is_sharded, reshard, total
from .convolution import InParts, is_large
from .sparse_weight import SparseWeight

# Told of a weight, of what goes on of it, of what has stopped of it, and of the mask of what goes on.
HandOn = Callable[[SparseWeight, SparseWeight | None, SparseWeight, Tensor], None]
OWNER = "sara_owner"  # attribute of a parameter that is being trained
NAMED, LARGE_SHARE = (
    3,
    0.05,
)  # of weights without a gradient: how many are named, and when it is a warning
IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"  # attribute of a module, known to torch

logger = logging.getLogger("comfyui-sara")


class SparseModel:
    """Selected weights of a module, hooked up so that their gradients stay sparse.

    Making it sets `requires_grad=False` on all parameters without a selected weight and drops
    gradients the module holds; `detach` gives `requires_grad` back.

    Args:
        module: The model; its selected weights change only through `write_` and `restore_`.
        index: Sorted flat positions by parameter name, none of them empty.
        thresholds: Of parameters that have one of their own.
        rates: Codes of factors of the learning rate by parameter name, see `SparseWeight`.
    """

    def __init__(
        self,
        module: nn.Module,
        index: Mapping[str, Tensor],
        thresholds: Mapping[str, float] | None = None,
        rates: Mapping[str, Tensor] | None = None,
    ):
        self.module = module
        self._arrived: Callable[..., None] | None = None
        self._reduced: str | None = None
        self.parameters = dict(module.named_parameters())
        self._large_convolutions: list[Any] = [part for part in module.modules() if is_large(part)]
        self.active = [SparseWeight(name, self.parameters[name], i) for name, i in index.items()]
        for weight in self.active:
            weight.threshold = (thresholds or {}).get(weight.name)
            if (codes := (rates or {}).get(weight.name)) is not None:
                weight.rates = codes.to(learned_on(weight.parameter))
        self.frozen: list[SparseWeight] = []
        self._requires_grad = {name: p.requires_grad for name, p in self.parameters.items()}
        self._hooks: list = []
        self._acting: list[SparseWeight] = []
        self.attach()

    @property
    def attached(self) -> bool:
        """Whether gradients are being captured."""
        return bool(self._hooks)

    @property
    def every(self) -> list[SparseWeight]:
        """The weights that train, and those that no longer do."""
        return [*self.active, *self.frozen]

    @property
    def averaged(self) -> list[SparseWeight]:
        """The active weights that each process has as a whole; `fully_shard` averages the others."""
        return [weight for weight in self.active if not is_sharded(weight.parameter)]

    def attach(self) -> None:
        """Capture the gradients of the active weights; freeze every other parameter."""
        self._unhook()
        refuse_owned(self.parameters, self)
        active = {weight.name for weight in self.active}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in active or name == self._reduced)
            parameter.grad = None
        averaged = set(map(id, self.averaged))
        for weight in self.active:
            arrived = _weakly(self._arrived) if id(weight) in averaged else None
            hook = _weak_hook(weight, arrived)
            self._hooks.append(weight.parameter.register_post_accumulate_grad_hook(hook))
            if arrived is not None:  # of weights made in parts, only the leaf gets a gradient
                self._hooks.append(weight.leaf.register_post_accumulate_grad_hook(arrived))
        self._let_quantised_act()
        by_parameter = {weight.parameter: weight for weight in self.active}
        self._hooks += [
            InParts(convolution, by_parameter[convolution.weight])
            for convolution in self._large_convolutions
            if convolution.weight in by_parameter
        ]
        for parameter in self.parameters.values():
            setattr(parameter, OWNER, weakref.ref(self))

    def _let_quantised_act(self) -> None:
        """Have quantised parameters act with what has been learned of them."""
        quantised = [p for p in self.parameters.values() if isinstance(p, Quantised)]
        known = {id(weight) for weight in self._acting}
        for parameter in quantised:
            foreign = [w for w in parameter.source.learned if id(w) not in known]
            if any(weight.acting is not None for weight in foreign):
                raise RuntimeError(
                    "the model acts with what another SaraAdamW has learned, beside weights that are "
                    "stored in few bits; call that one's restore(), and go on from its delta"
                )
        self._acting = [*self.frozen, *self.active]
        for parameter in quantised:
            parameter.source.learned = [w for w in self._acting if w.parameter is parameter]

    def share(self, arrived: Callable[..., None]) -> None:
        """Have other processes train the same module: say when gradients come, leave them to SaRA.

        DistributedDataParallel is told to reduce none of the selected parameters. It refuses a module
        with nothing to reduce, so the last parameter of fewer than two dimensions without selected
        weights is left to it: it gets a gradient, which nothing uses.

        Args:
            arrived: Called within backward for each weight whose gradient has come.
        """
        selected = {weight.name for weight in self.active}
        others = [
            name
            for name, parameter in self.parameters.items()
            if parameter.dim() < 2 and name not in selected and not is_sharded(parameter)
        ]
        self._arrived, self._reduced = arrived, others[-1] if others else None
        setattr(self.module, IGNORED_BY_DDP, sorted(selected))
        self.attach()

    def refuse_replaced(self) -> None:
        """Raise if the module has other parameters by now than those that are trained.

        Raises:
            RuntimeError: It has.
        """
        reshard(self.module)
        now = dict(self.module.named_parameters())
        for weight in self.active:
            if now.get(weight.name) is not weight.parameter:
                raise RuntimeError(
                    f"the model's parameter {weight.name!r} is not the one SaraAdamW was made for, so it "
                    "would not train: fully_shard, to_empty or an assignment has replaced it. Do that "
                    "first, then make the optimizer"
                )

    def tell_of_those_without_gradient(self) -> None:
        """Log which active weights have got no gradient, such as those of layers that were not called."""
        silent = [weight for weight in self.active if weight.leaf.grad is None]
        count = sum(weight.num_whole for weight in silent)
        share = count / sum(weight.num_whole for weight in self.active)
        names = ", ".join(weight.name for weight in silent[:NAMED])
        logger.log(
            logging.WARNING if share > LARGE_SHARE else logging.INFO,
            "%d selected weights (%.1f %%) have got no gradient and stay as they are, in %s%s",
            count, 100 * share, names, ", ..." if len(silent) > NAMED else "",
        )  # fmt: skip

    def detach(self) -> None:
        """Let go of the module as it is: remove the hooks, give `requires_grad` back."""
        self._unhook()
        try:
            self._each(SparseWeight.keep)
        finally:
            if self._arrived is not None and hasattr(self.module, IGNORED_BY_DDP):
                delattr(self.module, IGNORED_BY_DDP)
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(self._requires_grad[name])
                if getattr(parameter, OWNER, lambda: None)() is self:
                    delattr(parameter, OWNER)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def restore_(self) -> None:
        """Put all base values back into the module, bit for bit, as far as that can be done.

        Raises:
            Exception: The first error of any weight, after all others have been put back.
        """
        try:
            self._each(SparseWeight.restore_)
        finally:
            reshard(self.module)

    def _each(self, act: Callable[[SparseWeight], None]) -> None:
        """Do something with every weight; the first error is raised after all have had their turn."""
        first = None
        for weight in self.every:
            try:
                act(weight)
            except Exception as error:
                first = first or error
        if first is not None:
            raise first

    @contextlib.contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """Have the module hold base + strength * (learned - base) for a while."""
        weights = self.every
        if strength == 1 and all(weight.average is None for weight in weights):
            yield
            return
        try:
            for weight in weights:
                weight.scale_(strength)
            reshard(self.module)
            yield
        finally:
            self._each(lambda weight: weight.write_(weight.trained, weight.index))
            reshard(self.module)

    def marks_below(self, threshold: float) -> tuple[list[Tensor], int]:
        """Mark the active weights whose trained value lies closer to zero than their own or else a threshold.

        Returns:
            One bool mask `(k,)` per active weight, and the number marked in all.
        """
        limits = [threshold if w.threshold is None else w.threshold for w in self.active]
        marks = [w.trained.abs() < limit for w, limit in zip(self.active, limits, strict=True)]
        pairs = zip(self.active, marks, strict=True)
        return marks, int(sum(total(weight.parameter, mark.sum()) for weight, mark in pairs))

    def freeze(self, marks: Sequence[Tensor], hand_on: HandOn) -> None:
        """Go on with the marked active weights only; the others keep their learned value.

        One weight is taken after the other, and what it was is let go, so that little is there twice.

        Args:
            marks: One bool mask `(k,)` per active weight: those that go on.
            hand_on: Called for each weight of which something stops, with what goes on of it (None for
                nothing), with what has stopped, and with its mask.
        """
        self._unhook()
        self._let_go_of_quantised()
        place = 0
        for mark in marks:
            weight = self.active[place]
            num_kept = int(total(weight.parameter, mark.sum()))
            if num_kept < weight.num_whole:
                kept = weight.part(mark) if num_kept else None
                stopped = weight.part(~mark)
                stopped.gradient = weight.gradient = None
                hand_on(weight, kept, stopped, mark)
                self.frozen.append(stopped)
                self.active[place : place + 1] = [] if kept is None else [kept]
            place += bool(num_kept)
        self.attach()

    def _let_go_of_quantised(self) -> None:
        """Have quantised parameters hold none of these weights, until they are attached again."""
        ours = {id(weight) for weight in self._acting}
        for parameter in self.parameters.values():
            if isinstance(parameter, Quantised):
                learned = parameter.source.learned
                parameter.source.learned = [w for w in learned if id(w) not in ours]
        self._acting = []

    def entries(self) -> dict[str, DeltaEntry]:
        """Return learned minus base of active and frozen weights, on the CPU, in module order."""
        entries = entries_of(self.state())
        return {name: entries[name] for name in self.parameters if name in entries}

    def state(self) -> list[dict]:
        """Return the selection, base and trained values as tensors and plain values."""
        return [
            weight.record() | {"frozen": frozen}
            for frozen, group in ((False, self.active), (True, self.frozen))
            for weight in group
        ]


def refuse_owned(parameters: Mapping[str, Tensor], but_by: SparseModel | None = None) -> None:
    """Refuse parameters that are being trained already.

    Raises:
        RuntimeError: By another one than `but_by`.
    """
    for name, parameter in parameters.items():
        owner = getattr(parameter, OWNER, lambda: None)()
        if owner is not None and owner is not but_by:
            raise RuntimeError(
                f"parameter {name!r} is already being trained by another SaraAdamW; call its "
                "restore() or detach() first"
            )


def entries_of(records: Sequence[Mapping]) -> dict[str, DeltaEntry]:
    """Return learned minus base of saved weights by parameter name, on the CPU; the average where one is kept.

    Args:
        records: As `SparseModel.state` returns them; a parameter may have an active and a frozen
            part.
    """
    parts: dict[str, list[Mapping]] = {}
    for record in records:
        parts.setdefault(record["name"], []).append(record)
    entries = {}
    for name, found in parts.items():
        index = torch.cat([record["index"].cpu() for record in found])
        learned = [record.get("average", record["values"]) for record in found]
        bases = [record["base"].to(record["values"].dtype) for record in found]
        values = torch.cat([(a - b).cpu() for a, b in zip(learned, bases, strict=True)])
        if len(found) > 1:
            order = torch.argsort(index)
            index, values = index[order], values[order]
        entries[name] = DeltaEntry(index, values, tuple(found[0]["shape"]))
    return entries


def _weakly(act: Callable[[Tensor], None] | None) -> Callable[[Tensor], None] | None:
    """Call a method for as long as its object is there."""
    if act is None:
        return None
    reference = weakref.WeakMethod(act)

    def call(tensor: Tensor) -> None:
        if (alive := reference()) is not None:
            alive(tensor)

    return call


def _weak_hook(
    weight: SparseWeight, arrived: Callable[[Tensor], None] | None
) -> Callable[[Tensor], None]:
    """Capture a parameter's gradient for as long as someone trains it, and say so."""
    reference = weakref.ref(weight)

    def hook(parameter: Tensor) -> None:
        alive = reference()
        if alive is not None and alive.capture_gradient(parameter) and arrived is not None:
            arrived(parameter)

    return hook
