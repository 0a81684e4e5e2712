"""Gradient checkpointing of any module's blocks, switched on for a while."""

import contextlib
import functools
from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules below `module` that are no mere containers."""
    for child in module.children():
        if isinstance(child, CONTAINERS):
            yield from blocks_of(child)
        else:
            yield child


@contextlib.contextmanager
def checkpointed(module: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Recompute each block's activations in backward instead of keeping them.

    Results are the same; a forward pass more per step buys the memory of all inner activations.
    The blocks' own `forward` is back afterwards.

    Args:
        module: Model whose blocks are checkpointed.
        enabled: False does nothing.
    """
    changed = []
    try:
        for block in blocks_of(module) if enabled else ():
            changed.append((block, block.__dict__.get("forward")))
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block, replaced in changed:
            del block.forward
            if replaced is not None:  # someone else's patch
                block.forward = replaced
