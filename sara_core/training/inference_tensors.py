"""Turn tensors made in inference mode into ordinary ones that autograd can save."""

import copy
import dataclasses
from collections.abc import Callable

from torch import Tensor, nn


def is_tracked(tensor: Tensor) -> bool:
    """Tell whether autograd can save a tensor: one made in inference mode has no version.

    A parameter whose data was replaced by an inference tensor, or the other way round, does not
    always say so in `is_inference()`.
    """
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def make_trackable(module: nn.Module) -> None:
    """Replace a module's parameters and buffers that autograd cannot save by equal ones.

    One at a time, so that there is never a second copy of the module; shared parameters stay
    shared. Call it outside inference mode.
    """
    done: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and not is_tracked(old):
                if id(old) not in done:
                    done[id(old)] = nn.Parameter(old.detach().clone(), old.requires_grad)
                part._parameters[name] = done[id(old)]
        for name, buffer in part._buffers.items():
            if buffer is not None and not is_tracked(buffer):
                part._buffers[name] = buffer.clone()


def trackable_copy(value):
    """Copy the tensors in nested lists, tuples and dicts; other values are kept."""
    return map_tensors(value, Tensor.clone)


def map_tensors(value, change: Callable[[Tensor], Tensor]):
    """Change the tensors in nested lists, tuples, dicts and dataclasses; other values are kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        changed_dict = copy.copy(value)  # of the same kind
        changed_dict.update({key: map_tensors(item, change) for key, item in value.items()})
        return changed_dict
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        changed = {name: map_tensors(getattr(value, name), change) for name in fields}
        return dataclasses.replace(value, **changed)
    return value
