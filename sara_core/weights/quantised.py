"""Weights that stay as they are stored, in eight bits or packed: numbers are made of them when they are used.

Every operation makes the numbers anew and drops them when it is done. What autograd saves, for a linear
layer or a convolution as well as within gradient checkpointing, is the stored weight, so at most one layer is
held in numbers at any time, in forward and backward pass.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .at_positions import write_

aten = torch.ops.aten


class Learned(Protocol):
    """Some weights of a parameter that are other numbers by now than what is stored."""

    acting: Tensor | None

    @property
    def index(self) -> Tensor:
        """Flat positions, `(k,)`."""


@dataclass(eq=False)
class Source:
    """What a weight's numbers are made of.

    Args:
        stored: Any type of tensor. Never changed.
        convert: Returns its numbers, of its shape, where it is.
        learned: What replaces some of them, while `acting` is not None.
    """

    stored: Tensor
    convert: Callable[[Tensor], Tensor]
    learned: Sequence[Learned] = field(default_factory=tuple)

    def numbers(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make the numbers as they are at present; they are the caller's to change."""
        stored = self.stored.to(device)
        with torch.no_grad():
            numbers = self.convert(stored).detach().to(dtype)
            if numbers.data_ptr() == stored.data_ptr():
                numbers = numbers.clone()
            for part in self.learned:
                if part.acting is not None:
                    write_(numbers, part.index.to(device), part.acting.to(device, dtype))
        return numbers


class Quantised(Tensor):
    """Acts as a weight of numbers, in any operation; see the module.

    Args:
        source: What they are made of.
        dtype: Of the numbers.
        device: Of the numbers; where the stored weight is, if left out.
        is_transposed: Whether it is the transpose of a matrix.
    """

    source: Source
    is_transposed: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, source, dtype, device=None, is_transposed=False):
        """Make one without any memory of its own."""
        shape = source.stored.shape[::-1] if is_transposed else source.stored.shape
        device = source.stored.device if device is None else device
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.source, made.is_transposed = source, is_transposed
        return made

    def __repr__(self, *, tensor_contents=None):
        return f"Quantised({tuple(self.shape)}, {self.source.stored.dtype}, as {self.dtype})"

    def numbers(self) -> Tensor:
        """Make the numbers."""
        made = self.source.numbers(self.dtype, self.device)
        return made.t() if self.is_transposed else made

    def unlearned(self) -> "Quantised":
        """Return the weight as it is stored, whatever has been learned."""
        source = Source(self.source.stored, self.source.convert)
        return Quantised(source, self.dtype, self.device, self.is_transposed)

    def _other(self, dtype=None, device=None, turned=False) -> "Quantised":
        is_transposed = self.is_transposed != turned
        return Quantised(self.source, dtype or self.dtype, device or self.device, is_transposed)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        """Do an operation on the numbers, or on what they are made of if it only looks at them."""
        kwargs = kwargs or {}
        if function in (aten.detach.default, aten.alias.default):
            return args[0]._other()
        if function is aten.t.default:
            return args[0]._other(turned=True)
        if function is aten._to_copy.default and not kwargs.keys() - {"dtype", "device"}:
            return args[0]._other(**kwargs)
        if function._schema.is_mutable:
            _refuse_writing(function, args, kwargs)
        made: dict[int, Tensor] = {}
        given = tree_map_only(Quantised, lambda own: _once(own, made), (args, kwargs))
        return function(*given[0], **given[1])


def _once(weight: Quantised, made: dict[int, Tensor]) -> Tensor:
    if id(weight) not in made:
        made[id(weight)] = weight.numbers()
    return made[id(weight)]


def _refuse_writing(function, args: tuple, kwargs: dict[str, Any]) -> None:
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(given, Quantised):
                raise RuntimeError(
                    f"{function} would change a weight that is stored in {given.source.stored.dtype} and "
                    "stays as it is; load the model in a dtype of 16 or 32 bits to change its weights"
                )


def stored_bytes(weight: Tensor) -> int:
    """Return how many bytes a weight takes."""
    return weight.source.stored.nbytes if isinstance(weight, Quantised) else weight.nbytes


@contextlib.contextmanager
def numbers_on_use(
    module: nn.Module,
    converters: dict[str, Callable[[Tensor], Tensor]],
    dtype: torch.dtype,
) -> Iterator[None]:
    """Have some of a module's parameters act as numbers for a while; the very same are put back.

    Args:
        module: The model.
        converters: What makes numbers of a parameter, by its name.
        dtype: Of the numbers.
    """
    replaced: list[tuple[dict, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}  # shared parameters stay shared
    try:
        for path, part in module.named_modules():
            for name, stored in list(part._parameters.items()):
                full_name = f"{path}.{name}" if path else name
                if stored is None or full_name not in converters:
                    continue
                if id(stored) not in made:
                    source = Source(stored.detach(), converters[full_name])
                    made[id(stored)] = nn.Parameter(Quantised(source, dtype), requires_grad=False)
                replaced.append((part._parameters, name, stored))
                part._parameters[name] = made[id(stored)]
        yield
    finally:
        for parameters, name, stored in replaced:
            parameters[name] = stored
