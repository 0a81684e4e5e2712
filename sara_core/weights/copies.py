"""Recognise plain copies of a weight, in another dtype or place, by autograd's graph."""

import torch
from torch import Tensor, nn

CASTS = ("ToCopyBackward0", "torch::autograd::CopyBackwards")  # autograd's nodes of `to`, `copy_`


def is_copy(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Tell whether a tensor is the parameter, or a plain copy of it in another dtype or place."""
    return tensor is parameter or copied_leaf(tensor.grad_fn) is parameter


def copied_leaf(node: torch.autograd.graph.Node | None) -> Tensor | None:
    """Return the leaf that a chain of casts and copies begins with, or None if it has other parts.

    Args:
        node: Autograd's node at the end of the chain.
    """
    while node is not None and node.name() in CASTS:
        node = next((before for before, _ in reversed(node.next_functions) if before), None)
    return getattr(node, "variable", None)
