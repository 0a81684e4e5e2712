"""Weights that stay as they are stored, in eight bits or packed: numbers are made of them when they are used.

Every operation makes the numbers anew and drops them when it is done. What autograd saves of a linear layer
or a convolution, also within gradient checkpointing, is the stored weight, so that one layer at a time is held in
numbers, in forward and backward pass. Results that share a weight's memory, as of `view`, are plain numbers.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .at_positions import write_
from .codes import reader

CHUNK = 1 << 23  # numbers that are scaled in one go
aten = torch.ops.aten
WITH_RESULTS_OF_THEIR_OWN = (  # where most of the time goes; they return nothing that shares their input
    aten.mm.default,
    aten.addmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
)


class Learned(Protocol):
    """Some weights of a parameter that are other numbers by now than what is stored."""

    acting: Tensor | None

    @property
    def index(self) -> Tensor:
        """Flat positions, `(k,)`."""


class Scratch(threading.local):
    """Memory of the largest weight's numbers on a processor, which takes its time to hand out new memory.

    Each thread has its own.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return uninitialised memory, the same each time."""
        size = shape.numel() * dtype.itemsize
        if size > len(self._bytes):
            with torch.inference_mode(False):  # or it could not be written to outside of it
                self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        return self._bytes[:size].view(dtype).view(shape)


@dataclass(eq=False)
class Source:
    """What a weight's numbers are made of.

    Args:
        stored: Any type of tensor. Never changed.
        convert: Returns its numbers, of its shape, where it is; or codes of eight bits as they are.
        scale: What the numbers are multiplied with, one for all.
        scratch: Where the numbers of one weight at a time are.
        learned: What replaces some of them, while `acting` is not None.
    """

    stored: Tensor
    convert: Callable[[Tensor], Tensor]
    scale: Tensor | None = None
    scratch: Scratch = field(default_factory=Scratch)
    learned: Sequence[Learned] = field(default_factory=tuple)
    _read: Callable[[Tensor, Tensor | None, Tensor], Tensor] | None = field(
        default=None, init=False
    )

    @torch.no_grad()
    def numbers(self, out: Tensor) -> Tensor:
        """Write the numbers as they are at present into `out`, which is returned."""
        stored = self.stored.to(out.device, non_blocking=out.device.type != "cpu")
        made = self.convert(stored)
        if made.dtype.itemsize == 1 and made.device.type == "cpu":
            if self._read is None:
                self._read = reader(made)
            self._read(made, self.scale, out)
        elif self.scale is None:
            out.copy_(made)
        else:
            scale = self.scale.to(made.device)
            parts = zip(made.reshape(-1).split(CHUNK), out.view(-1).split(CHUNK), strict=True)
            for part, numbers in parts:
                numbers.copy_(part.float() * scale)
        for part in self.learned:
            if part.acting is not None:
                write_(out, part.index.to(out.device), part.acting.to(out.device, out.dtype))
        return out


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
        shape, strides = source.stored.shape, None
        if is_transposed:  # autograd makes the gradient in the same order
            shape, strides = shape[::-1], (1, shape[1])
        device = source.stored.device if device is None else device
        made = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=device)
        made.source, made.is_transposed = source, is_transposed
        return made

    def __repr__(self, *, tensor_contents=None):
        return f"Quantised({tuple(self.shape)}, {self.source.stored.dtype}, as {self.dtype})"

    def numbers(self, passing: bool = False) -> Tensor:
        """Make the numbers.

        Args:
            passing: They are needed until the next are made, and no longer.
        """
        shape, scratch = self.source.stored.shape, self.source.scratch
        make = scratch.empty if passing and self.device.type == "cpu" else torch.empty
        made = self.source.numbers(make(shape, dtype=self.dtype, device=self.device))
        return made.t() if self.is_transposed else made

    def unlearned(self) -> "Quantised":
        """Return the weight as it is stored, whatever has been learned."""
        source = dataclasses.replace(self.source, learned=())
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
            dtype = kwargs.get("dtype", args[0].dtype)
            if dtype == args[0].dtype or dtype.itemsize < args[0].dtype.itemsize:
                return args[0]._other(**kwargs)
        if function._schema.is_mutable:
            _refuse_writing(function, args, kwargs)
        passing = function in WITH_RESULTS_OF_THEIR_OWN
        passing &= sum(isinstance(given, Quantised) for given in args) == 1
        given = tree_map_only(Quantised, lambda weight: weight.numbers(passing), (args, kwargs))
        return function(*given[0], **given[1])


def _refuse_writing(function, args: tuple, kwargs: dict[str, Any]) -> None:
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            if isinstance(given, Quantised):
                raise RuntimeError(
                    f"{function} would change a weight that SaRA keeps as it is stored while it trains; "
                    "change it before or after the training"
                )


def bytes_on(device: torch.device, weight: Tensor) -> int:
    """Return how many bytes a weight takes on a device, however it is stored."""
    stored = weight.source.stored if isinstance(weight, Quantised) else weight
    return stored.nbytes if stored.device == device else 0


@contextlib.contextmanager
def numbers_on_use(
    module: nn.Module,
    converters: Mapping[str, Callable[[Tensor], Tensor]],
    dtype: torch.dtype,
    scales: Mapping[str, Tensor] = MappingProxyType({}),
    device: torch.device | None = None,
) -> Iterator[None]:
    """Have some of a module's parameters act as numbers for a while; the very same are put back.

    Args:
        module: The model.
        converters: What makes numbers of a parameter, by its name; see `Source`.
        dtype: Of the numbers.
        scales: What the numbers of some of them are multiplied with.
        device: Where numbers are made and trained values are kept; by default where each weight is stored. What
            is stored elsewhere is sent there whenever it is used.
    """
    replaced: list[tuple[dict, str, nn.Parameter]] = []
    made: dict[int, Any] = {}  # shared parameters stay shared
    scratch = Scratch()
    try:
        for path, part in module.named_modules():
            for name, stored in list(part._parameters.items()):
                full_name = f"{path}.{name}" if path else name
                if stored is None or full_name not in converters:
                    continue
                if id(stored) not in made:
                    scale = scales.get(full_name)
                    source = Source(stored.detach(), converters[full_name], scale, scratch)
                    made[id(stored)] = nn.Parameter(
                        Quantised(source, dtype, device), requires_grad=False
                    )
                replaced.append((part._parameters, name, stored))
                part._parameters[name] = made[id(stored)]
        yield
    finally:
        for parameters, name, stored in replaced:
            parameters[name] = stored
        for parameter in made.values():  # which would keep one another, and what is stored
            parameter.source.learned = ()
