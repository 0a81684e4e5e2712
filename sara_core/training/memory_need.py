"""How much memory a run needs, from a forward and backward pass whose tensors are counted."""

import dataclasses
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ..weights.quantised import Quantised


class LiveBytes(TorchDispatchMode):
    """Counts, while it is on, the bytes of the tensors that operations make, until they are gone.

    Any device will do, as no allocator is asked; what kernels use inside themselves is not seen.

    Args:
        device: Where tensors count.

    Attributes:
        now: Bytes that are held at present.
        peak: The most there were at one time.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.now = self.peak = 0
        self._device = device
        self._known: dict[int, weakref.ref] = {}  # storages by identity, to hear of their end

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if Quantised in types:  # what is done with their numbers comes by itself
            return NotImplemented
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, 0)  # there before, and so is what views of it share
        result = function(*args, **kwargs)
        for tensor in tree_leaves(result):
            self._note(tensor, None)
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, tensor: object, size: int | None) -> None:
        if (
            not isinstance(tensor, Tensor)
            or is_traceable_wrapper_subclass(tensor)
            or tensor.layout != torch.strided
            or tensor.device != self._device
        ):
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes() if size is None else size

        def gone(_):
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size


def most_bytes(device: torch.device, function: Callable[[], Any], backend: Any = None) -> int:
    """Return the most bytes that what a function makes takes at a time.

    What kernels take for themselves, such as workspaces, is in it where the device's allocator tells.

    Args:
        device: Where tensors count.
        function: Makes them.
        backend: What knows of the allocator; found by the device if left out.
    """
    backend = getattr(torch, device.type, None) if backend is None else backend
    tells = hasattr(backend, "max_memory_allocated")
    if tells:
        backend.reset_peak_memory_stats(device)
        before = backend.memory_allocated(device)
    with LiveBytes(device) as live:
        function()
    if tells:
        return max(live.peak, backend.max_memory_allocated(device) - before)
    return live.peak


@dataclass(frozen=True)
class MemoryNeed:
    """What a run takes on its device, in bytes.

    Args:
        base: The model.
        trained: Trained weights with gradients, moments and base values.
        activations: The most that a forward and backward pass over a batch takes beside them.
        picture: What each picture of the batch adds to that.
        free: What there is for all of these together.
        batch_size: Pictures in a batch.
    """

    base: int
    trained: int
    activations: int
    picture: int
    free: int
    batch_size: int

    @property
    def total(self) -> int:
        """What it takes together."""
        return self.base + self.trained + self.activations

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.total <= self.free

    def with_batch(self, size: int) -> "MemoryNeed":
        """Return the need with batches of another size."""
        fewer = (self.batch_size - size) * self.picture
        return dataclasses.replace(
            self, activations=max(0, self.activations - fewer), batch_size=size
        )

    def largest_batch(self) -> int:
        """Return the largest batch that fits, at most the present one; 0 if none does."""
        over = self.total - self.free
        if over <= 0:
            return self.batch_size
        return max(0, self.batch_size - math.ceil(over / self.picture)) if self.picture else 0

    def largest_area(self) -> float:
        """Return the share of the pictures' area that fits, in `[0, 1]`, as activations go with it."""
        left = self.free - self.base - self.trained
        return min(1.0, max(0.0, left / self.activations)) if self.activations else 1.0
