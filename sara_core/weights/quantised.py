"""Weights that stay as they are stored, in eight bits or packed: numbers are made of them when they are used.

Every operation makes the numbers anew and drops them when it is done. What autograd saves of a linear layer
or a convolution, also within gradient checkpointing, is the stored weight, so that one layer at a time is held in
numbers, in forward and backward pass. Results that share a weight's memory, as of `view`, are plain numbers.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .copies_ahead import CopiesAhead
from .stored import Scratch, Source
from .written import written_to

SMALL = 1 << 16  # weights up to which a parameter is not worth sending again and again
aten = torch.ops.aten
WITH_RESULTS_OF_THEIR_OWN = (  # where most of the time goes; they return nothing that shares their input
    aten.mm.default,
    aten.addmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
)


class Quantised(Tensor):
    """Acts as a weight of numbers, in any operation; see the module.

    Args:
        source: What they are made of.
        dtype: Of the numbers.
        device: Of the numbers; where the stored weight is, if left out.
        learned_on: Device of what is trained; that of the numbers, if left out.
        is_transposed: Whether it is the transpose of a matrix.
    """

    source: Source
    learned_on: torch.device
    is_transposed: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, source, dtype, device=None, learned_on=None, is_transposed=False):
        """Make one without any memory of its own."""
        shape, strides = source.stored.shape, None
        if is_transposed:  # autograd makes the gradient in the same order
            shape, strides = shape[::-1], (1, shape[1])
        device = source.stored.device if device is None else device
        made = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=device)
        made.source, made.is_transposed = source, is_transposed
        made.learned_on = device if learned_on is None else learned_on
        return made

    def __repr__(self, *, tensor_contents=None):
        return f"Quantised({tuple(self.shape)}, {self.source.stored.dtype}, as {self.dtype})"

    def numbers(self, passing: bool = False) -> Tensor:
        """Make the numbers.

        Args:
            passing: They are needed until the next are made, and no longer.
        """
        made = self.source.numbers(self.dtype, self.device, passing)
        return made.t() if self.is_transposed else made

    def unlearned(self) -> "Quantised":
        """Return the weight as it is stored, whatever has been learned."""
        source = dataclasses.replace(self.source, learned=())
        source.resident = self.source.resident
        return Quantised(source, self.dtype, self.device, self.learned_on, self.is_transposed)

    def _other(self, dtype=None, device=None, turned=False) -> "Quantised":
        is_transposed = self.is_transposed != turned
        device = device or self.device
        return Quantised(self.source, dtype or self.dtype, device, self.learned_on, is_transposed)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Do an operation on the numbers, or on what they are made of if it only looks at them."""
        kwargs = kwargs or {}
        if function in (aten.detach.default, aten.alias.default):
            return args[0]._other()
        if function is aten.t.default:
            return args[0]._other(turned=True)
        if function is aten._to_copy.default and not kwargs.keys() - {"dtype", "device"}:
            dtype = kwargs.get("dtype", args[0].dtype)
            if dtype == args[0].dtype or dtype.itemsize < args[0].dtype.itemsize:
                return args[0]._other(**kwargs)
        if any(isinstance(tensor, Quantised) for tensor in written_to(function, args, kwargs)):
            raise RuntimeError(
                f"{function} would change a weight that SaRA keeps as it is stored while it trains; "
                "change it before or after the training"
            )
        passing = function in WITH_RESULTS_OF_THEIR_OWN
        passing &= sum(isinstance(given, Quantised) for given in args) == 1
        given = tree_map_only(Quantised, lambda weight: weight.numbers(passing), (args, kwargs))
        return function(*given[0], **given[1])


def learned_on(weight: Tensor) -> torch.device:
    """Return the device of what is trained of a weight."""
    return weight.learned_on if isinstance(weight, Quantised) else weight.device


def bytes_on(device: torch.device, weight: Tensor) -> int:
    """Return how many bytes a weight takes on a device, however it is stored."""
    held: list[Tensor | None] = [weight]
    if isinstance(weight, Quantised):
        held = [weight.source.stored, weight.source.resident]
    return sum(tensor.nbytes for tensor in held if tensor is not None and tensor.device == device)


def keep_on_device(module: nn.Module, budget: float) -> int:
    """Have some of the weights that wait elsewhere stay where they are used, spread evenly over the model.

    Copies of the others come while those are computed with.

    Args:
        module: With parameters that act as numbers.
        budget: Bytes they may take in all, beside those that stay already.

    Returns:
        Bytes they take.
    """
    waiting = [
        p for p in module.parameters()
        if isinstance(p, Quantised) and not bytes_on(p.device, p)
    ]  # fmt: skip
    share = budget / max(1, sum(p.source.stored.nbytes for p in waiting))
    kept = seen = 0
    for parameter in waiting:
        size = parameter.source.stored.nbytes
        seen += size
        if kept + size <= min(share * seen + 0.5 * size, budget):
            parameter.source.keep_on(parameter.device)
            kept += size
    return kept


@contextlib.contextmanager
def numbers_on_use(
    module: nn.Module,
    converters: Mapping[str, Callable[[Tensor], Tensor]],
    dtype: torch.dtype,
    scales: Mapping[str, Tensor] = MappingProxyType({}),
    device: torch.device | None = None,
    learned_on: torch.device | None = None,
    changes: Mapping[str, Sequence[Callable[[Tensor], Tensor]]] = MappingProxyType({}),
) -> Iterator[None]:
    """Have some of a module's parameters act as numbers for a while; the very same are put back.

    Args:
        module: The model.
        converters: What makes numbers of a parameter, by its name; see `Source`.
        dtype: Of the numbers of what is stored in a narrower one.
        scales: What the numbers of some of them are multiplied with.
        device: Where numbers are made; by default where each weight is stored. What is stored elsewhere is sent
            there whenever it is used, but for what is small.
        learned_on: Where trained values are kept; by default where the numbers are made.
        changes: What is done to the numbers of some of them, such as adding a LoRA.
    """
    replaced: list[tuple[dict, str, nn.Parameter]] = []
    made: dict[int, Any] = {}  # shared parameters stay shared
    scratch = Scratch()
    if device is not None:
        device = torch.empty(0, device=device).device  # as tensors there name it
    copies = None if device is None else CopiesAhead(device)
    try:
        for path, part in module.named_modules():
            for name, stored in list(part._parameters.items()):
                full_name = f"{path}.{name}" if path else name
                if stored is None or full_name not in converters:
                    continue
                if id(stored) not in made:
                    scale = scales.get(full_name)
                    source = Source(
                        stored.detach(),
                        converters[full_name],
                        None if scale is None else scale.to(device or scale.device),
                        scratch,
                        copies,
                        changes.get(full_name, ()),
                    )
                    if device is not None and stored.numel() <= SMALL:
                        source.keep_on(device)
                    is_wide = stored.is_floating_point() and stored.dtype.itemsize >= dtype.itemsize
                    own = stored.dtype if is_wide else dtype
                    acting = Quantised(source, own, device, learned_on)
                    made[id(stored)] = nn.Parameter(acting, requires_grad=False)
                replaced.append((part._parameters, name, stored))
                part._parameters[name] = made[id(stored)]
        yield
    finally:
        for parameters, name, stored in replaced:
            parameters[name] = stored
        for parameter in made.values():  # which would keep one another, and what is stored
            parameter.source.learned = ()
        if copies is not None:
            copies.forget()
