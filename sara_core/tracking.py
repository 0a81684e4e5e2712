"""Turn tensors made in inference mode into ordinary ones that autograd can save."""

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
        for name, old in part._buffers.items():
            if old is not None and not is_tracked(old):
                part._buffers[name] = old.clone()


def trackable_copy(value):
    """Copy the tensors in nested lists, tuples and dicts; other values are kept."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: trackable_copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(trackable_copy(item) for item in value)
    return value
