"""Models whose forward pass changes tensors that the backward pass needs, as Flux's `img += ...`.

Inference does not mind; autograd refuses, and gradient checkpointing would silently recompute from
changed inputs. Such a model is noticed by one forward pass, and then trained with every change made
after a copy of what is still needed.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


def changes_saved_tensors(forward: Callable[[], object]) -> bool:
    """Tell whether a forward pass changes a tensor after autograd has saved it.

    Nothing is kept for a backward pass, so this needs no more memory than inference does. Blocks
    under gradient checkpointing are not looked into; ask before it is switched on.

    Args:
        forward: Runs the model once.
    """
    watch = _Watch()
    hooks = torch.autograd.graph.saved_tensors_hooks(watch.note, lambda _: None)
    with torch.enable_grad(), watch, hooks:
        forward()
    return watch.found


class _Watch(TorchDispatchMode):
    """Looks out for operations that write to memory some saved tensor lies in."""

    def __init__(self):
        super().__init__()
        self.found = False
        self._saved: dict[int, StorageWeakRef] = {}  # the references keep addresses from reuse

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._saved[storage._cdata] = StorageWeakRef(storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.is_mutable and not self.found:
            self.found = any(self._is_saved(tensor) for tensor in _written(function, args, kwargs))
        return function(*args, **(kwargs or {}))

    def _is_saved(self, tensor: Tensor) -> bool:
        reference = self._saved.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()


def _written(function, args, kwargs) -> list[Tensor]:
    found = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[i] if i < len(args) else (kwargs or {}).get(argument.name))
    return [tensor for tensor in found if isinstance(tensor, Tensor)]
