"""Choices of the weights that train."""

import torch
import torch.nn.functional as F

WORDS, UNUSED = 768, 0.25  # columns that the text fills, and the size of weights behind the others


def positions_of(parameters, chosen, fraction, among=0.3, gradients=None, seed=0):
    """Choose weights.

    Args:
        parameters: Parameters by name.
        chosen: As `methods.masked` takes it.
        fraction: Share that is chosen.
        among: Share that counts as the smallest.
        gradients: Size of each weight's gradient by parameter name.
        seed: Of what is drawn.

    Returns:
        Flat positions by name, and the size of the largest small weight.
    """
    size = torch.cat([p.detach().abs().flatten() for p in parameters.values()])
    limit = _ranked(size, among) if chosen == "small gradient" else None
    keys = {
        name: _keys(p, chosen, number + 1_000 * seed, gradients and gradients[name], limit, among)
        for number, (name, p) in enumerate(parameters.items())
    }
    cut = _ranked(torch.cat(list(keys.values())), fraction)
    index = {name: (key <= cut).nonzero()[:, 0].int() for name, key in keys.items()}
    return {name: positions for name, positions in index.items() if len(positions)}, limit


def _ranked(values, share):
    """The value that a share of all lie at or below; `kthvalue` takes minutes where many are equal."""
    return values.sort().values[round(share * len(values)) - 1]


def _of_blocks(values, side=4):
    """The mean of the square block that each entry of a matrix or convolution lies in."""
    matrix = values.flatten(1)
    pooled = F.avg_pool2d(matrix[None], side, ceil_mode=True)
    spread = F.interpolate(pooled[None], scale_factor=side)[0, 0]
    return spread[: len(matrix), : matrix.shape[1]].reshape(values.shape).clone()


def _shares(values):
    """What share of a parameter's entries are smaller, for each."""
    return values.flatten().argsort().argsort().view_as(values) / values.numel()


def _keys(parameter, chosen, number, gradient, limit, among):
    """What is smaller for weights that are chosen first, (n,)."""
    size = parameter.detach().abs()
    if chosen == "random":
        key = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number))
    elif chosen in ("largest", "smallest"):
        key = -size if chosen == "largest" else size.clone()
    elif chosen == "layer":
        key = _shares(size)
    elif chosen == "rows":
        key = size.flatten(1).square().mean(1).view(-1, *[1] * (size.dim() - 1)).expand_as(size)
        key = key.clone()
    elif chosen == "blocks":
        key = _of_blocks(size.square())
    elif chosen in ("layer gradient", "layer mean gradient"):
        key = _shares(-gradient)
    elif chosen == "layer small gradient":
        key = _shares((-gradient).masked_fill(_shares(size) >= among, torch.inf))
    else:
        key = -gradient
        if limit is not None:
            key = key.masked_fill(size > limit, torch.inf)
    if parameter.dim() == 2 and parameter.shape[1] > WORDS:
        unused = parameter.detach()[:, WORDS:].abs() == UNUSED
        key[:, WORDS:][unused] = torch.inf
    return key.flatten()
