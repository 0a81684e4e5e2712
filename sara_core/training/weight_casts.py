"""Weights that are cast, or copied to the device, whenever they are used: autograd need not keep the copies.

A layer that computes in another precision than its weight is stored in, or on another device, makes a
copy of it, and autograd holds the copies of all layers until the backward pass: a second model. Each
can be recomputed from the weight when it is needed.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..weights.copies import CASTS, copied_leaf

TRANSPOSE = "TBackward0"  # a linear layer saves its weight so


@dataclass(frozen=True)
class Cast:
    """What it takes to recompute a copy of a weight; the weight must not change meanwhile."""

    parameter: nn.Parameter
    dtype: torch.dtype
    device: torch.device
    is_transposed: bool

    def make(self) -> Tensor:
        """Copy the weight."""
        copied = self.parameter.detach().to(self.device, self.dtype)
        return copied.t() if self.is_transposed else copied


def pack(tensor: Tensor) -> Tensor | Cast:
    """Return what to keep for the backward pass of a tensor that autograd wants to save.

    Kept with its history, a result that its own operation saves would hold itself alive.
    """
    node, is_transposed = tensor.grad_fn, False
    if node is not None and node.name() == TRANSPOSE:
        node, is_transposed = node.next_functions[0][0], True
    if node is None or node.name() not in CASTS:
        return tensor.detach()
    leaf = copied_leaf(node)
    if not isinstance(leaf, nn.Parameter):
        return tensor.detach()
    return Cast(leaf, tensor.dtype, tensor.device, is_transposed)


def unpack(kept: Tensor | Cast) -> Tensor:
    """Return what `pack` was given."""
    return kept.make() if isinstance(kept, Cast) else kept


@contextlib.contextmanager
def recomputed() -> Iterator[None]:
    """Have forward passes keep no copies of weights that require a gradient; backward recomputes them.

    Weights that do not require one cannot be told apart from activations, and their copies are kept.
    """
    with saved_tensors_hooks(pack, unpack):
        yield
