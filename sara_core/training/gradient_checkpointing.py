"""Gradient checkpointing of any module's blocks, switched on for a while."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .inference_tensors import map_tensors

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules below `module` that are no mere containers."""
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from blocks_of(child)
        else:
            yield child


@contextlib.contextmanager
def checkpointed(module: nn.Module, enabled: bool = True, in_place: bool = False) -> Iterator[None]:
    """Recompute each block's activations in backward instead of keeping them.

    Results are the same; a forward pass more per step buys the memory of all inner activations.
    The blocks' own `forward` is back afterwards.

    Args:
        module: Model whose blocks are checkpointed.
        enabled: False does nothing.
        in_place: The blocks change tensors that backward needs, as `in_place_changes.changes_saved_tensors`
            tells; the whole step is then to run under `changes_allowed` of that module.
    """
    changed = []
    try:
        for block in blocks_of(module) if enabled else ():
            changed.append((block, block.__dict__.get("forward")))
            block.forward = (
                functools.partial(_checkpoint_copies, block, block.forward)
                if in_place
                else functools.partial(checkpoint, block.forward, use_reentrant=False)
            )
        yield
    finally:
        for block, replaced in changed:
            del block.forward
            if replaced is not None:  # someone else's patch
                block.forward = replaced


def _checkpoint_copies(block, forward, *args, **kwargs):
    """Checkpoint a block that may change its inputs: it gets copies, in both of its passes.

    The reentrant kind of checkpoint, as only that builds an ordinary graph when it recomputes. It
    wants tensors as positional arguments, and one among them that requires a gradient.
    """
    tensors: list[Tensor] = []
    map_tensors((args, kwargs), lambda tensor: tensors.append(tensor) or tensor)
    if not any(tensor.requires_grad for tensor in (*block.parameters(), *tensors)):
        return forward(*args, **kwargs)

    def run(_, *given):
        copies = iter([tensor.clone() for tensor in given])
        new_args, new_kwargs = map_tensors((args, kwargs), lambda _: next(copies))
        return forward(*new_args, **new_kwargs)

    anchor = torch.empty(0, requires_grad=True)
    return checkpoint(run, anchor, *tensors, use_reentrant=True)
