"""SaRA's optimizer with one thing done otherwise."""

from unittest import mock

import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.optimizer.low_rank import polar_factor
from sara_core.optimizer.sparse_weight import SparseWeight

MOMENTUM, LIKE_ADAMW = 0.95, 0.2  # of Muon, and the root mean square of its updates


class LowRankChange(SaraAdamW):
    """Pulls what was learned toward low rank, instead of the trained values as in the paper."""

    def add_low_rank_gradient_(self):
        read = SparseWeight.read
        change = lambda weight, index: read(weight, index) - weight.base  # noqa: E731
        with mock.patch.object(SparseWeight, "read", change):
            super().add_low_rank_gradient_()


class Equalised(SaraAdamW):
    """Muon on the mask: the momentum's singular values become one, and the mask's part of that is the update.

    Source: Liu et al. 2025, arXiv:2502.16982, eq. 4, for its size; Nesterov's momentum.
    """

    @torch.no_grad()
    def step(self):
        nn.utils.clip_grad_norm_(self.parameters(), self.max_grad_norm)
        rate = self.param_groups[0]["lr"]
        for weight in self._weights.active:
            gradient, state = weight.gradient, self.state[weight.leaf]
            momentum = state.setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - MOMENTUM)
            matrix = torch.zeros(weight.parameter.shape).flatten()
            matrix[weight.index.long()] = torch.lerp(gradient, momentum, MOMENTUM)
            matrix = matrix.view(len(weight.parameter), -1)
            update = polar_factor(matrix).flatten()[weight.index.long()]
            size = LIKE_ADAMW * max(matrix.shape) ** 0.5
            weight.write_(weight.trained - rate * size * update, weight.index)


class ByLayerSize(SaraAdamW):
    """Moves the weights of a layer by a rate that goes with the spread of all its weights."""

    @torch.no_grad()
    def step(self):
        weights = self._weights.active
        before = [weight.trained.clone() for weight in weights]
        super().step()
        sizes = torch.stack([weight.parameter.detach().std() for weight in weights])
        factors = sizes / sizes.square().mean().sqrt()
        for weight, old, factor in zip(weights, before, factors, strict=True):
            weight.write_(torch.lerp(old, weight.trained, factor), weight.index)


class Reselecting(SaraAdamW):
    """Re-selects several times: after every so many steps."""

    def __init__(self, *args, every, **options):
        super().__init__(*args, **options)
        self.every = every

    def step(self):
        super().step()
        if self.num_steps % self.every == 0:
            for leaf in self.parameters():
                leaf.grad = None
            self.reselect()
