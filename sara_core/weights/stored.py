"""What a weight's numbers are made of where it stays as it is stored, and the making."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .at_positions import write_
from .codes import reader
from .copies_ahead import CopiesAhead
from .to_device import send

CHUNK = 1 << 23  # numbers that are scaled in one go


class Learned(Protocol):
    """Some weights of a parameter that are other numbers by now than what is stored."""

    acting: Tensor | None

    def index_on(self, device: torch.device) -> Tensor:
        """Flat positions, `(k,)`, on a device."""


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
        copies: What copies it to the device where it is used, if it is stored elsewhere.
        changes: What is done to the numbers, one after the other, such as adding a LoRA; each returns others,
            or the same.
        learned: What replaces some of them, while `acting` is not None.

    Attributes:
        resident: A copy that stays on the device.
    """

    stored: Tensor
    convert: Callable[[Tensor], Tensor]
    scale: Tensor | None = None
    scratch: Scratch = field(default_factory=Scratch)
    copies: CopiesAhead | None = None
    changes: Sequence[Callable[[Tensor], Tensor]] = ()
    learned: Sequence[Learned] = field(default_factory=tuple)
    resident: Tensor | None = field(default=None, init=False)
    _read: Callable[[Tensor, Tensor | None, Tensor], Tensor] | None = field(
        default=None, init=False
    )

    @torch.no_grad()
    def numbers(self, dtype: torch.dtype, device: torch.device, passing: bool = False) -> Tensor:
        """Make the numbers as they are at present.

        Args:
            dtype: Of the numbers.
            device: Of the numbers.
            passing: They are needed until the next are made, and no longer.
        """
        stored, is_own = self._on(device)
        made = self.convert(stored)
        if is_own and made.dtype == dtype and self.scale is None and type(made) is Tensor:
            out = made
        else:
            make = self.scratch.empty if passing and device.type == "cpu" else torch.empty
            out = self._write(made, make(self.stored.shape, dtype=dtype, device=device))
        for change in self.changes:
            out = change(out)
        for part in self.learned:
            if part.acting is not None:
                if not is_own and self.copies is not None and part.acting.device != device:
                    self.copies.hold_back()  # which taking a copy does by itself
                write_(out, part.index_on(device), send(part.acting, device).to(dtype))
        return out

    def keep_on(self, device: torch.device) -> None:
        """Have a copy stay where the weight is used."""
        if self.stored.device != device:
            self.resident = self.stored.to(device)

    def _on(self, device: torch.device) -> tuple[Tensor, bool]:
        """Return the stored weight on a device, and whether it is a copy that nobody else has."""
        if self.stored.device == device:
            return self.stored, False
        if self.resident is not None and self.resident.device == device:
            return self.resident, False
        if self.copies is not None and self.copies.device == device:
            return self.copies.take(self.stored), True
        return self.stored.to(device, non_blocking=device.type != "cpu"), False

    def _write(self, made: Tensor, out: Tensor) -> Tensor:
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
        return out
