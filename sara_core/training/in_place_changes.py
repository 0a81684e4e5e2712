"""Models whose forward pass changes tensors that the backward pass needs, as Flux's `img += ...`.

Inference does not mind; autograd refuses, and gradient checkpointing would silently recompute from
changed inputs. Such a model is noticed by one forward pass, and then trained with every change made
after a copy of what is still needed.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..weights.written import written_to
from . import weight_casts


def changes_saved_tensors(forward: Callable[[], object]) -> bool:
    """Tell whether a forward pass changes a tensor after autograd has saved it.

    Nothing is kept for a backward pass, so this needs no more memory than inference does. Blocks
    under gradient checkpointing are not looked into; ask before it is switched on.

    Args:
        forward: Runs the model once.
    """
    watch = _Watch()
    with (
        torch.enable_grad(),
        _Writes(watch.before_write),
        saved_tensors_hooks(watch.note, watch.refuse),
    ):
        forward()
    return watch.found


@contextlib.contextmanager
def changes_allowed() -> Iterator[None]:
    """Let a forward pass change saved tensors: what backward needs of them is copied before.

    Forward and backward pass both belong inside. Copies of weights are not kept, see `weight_casts`. As torch's `allow_mutation_on_saved_tensors`, which
    goes by address and version of a tensor and so misses changes through a view that begins further
    on; this goes by the memory they share.
    """
    copies = _Copies()
    with _Writes(copies.before_write), saved_tensors_hooks(copies.hold, copies.give):
        yield


class _Writes(TorchDispatchMode):
    """Tells of every tensor an operation is about to write to."""

    def __init__(self, before_write: Callable[[Tensor], None]):
        super().__init__()
        self.before_write = before_write

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in written_to(function, args, kwargs):
            self.before_write(tensor)
        return function(*args, **kwargs)


class _Watch:
    """Looks out for writes to memory that some saved tensor lies in."""

    def __init__(self):
        self.found = False
        self._saved: dict[int, StorageWeakRef] = {}  # the references keep addresses from reuse

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._saved[storage._cdata] = StorageWeakRef(storage)

    def refuse(self, kept: None) -> Tensor:
        raise RuntimeError("a forward pass that is only watched has no backward pass")

    def before_write(self, tensor: Tensor) -> None:
        reference = self._saved.get(tensor.untyped_storage()._cdata)
        self.found = self.found or (reference is not None and not reference.expired())


class _Held:
    """A tensor that autograd has saved."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class _Copies:
    """Copies saved tensors before the memory they lie in is written to."""

    def __init__(self):
        self._held: dict[int, list[weakref.ref]] = {}  # one that is alive keeps its memory alive

    def hold(self, tensor: Tensor) -> _Held | weight_casts.Cast:
        kept = weight_casts.pack(tensor)
        if isinstance(kept, weight_casts.Cast):
            return kept
        held = _Held(kept)
        self._held.setdefault(tensor.untyped_storage()._cdata, []).append(weakref.ref(held))
        return held

    def give(self, held: _Held | weight_casts.Cast) -> Tensor:
        return held.tensor if isinstance(held, _Held) else weight_casts.unpack(held)

    def before_write(self, tensor: Tensor) -> None:
        for reference in self._held.pop(tensor.untyped_storage()._cdata, ()):
            if (held := reference()) is not None:
                held.tensor = held.tensor.clone()
