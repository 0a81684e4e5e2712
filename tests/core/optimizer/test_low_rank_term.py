"""The low-rank term within a step."""

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW

from ..helpers import THRESHOLD, Net, loss_of, pair


def test_low_rank_term_changes_what_is_learned_as_its_gradient_says():
    torch.manual_seed(0)
    net = nn.Linear(72, 90, bias=False)
    base = net.weight.detach().clone()
    mask = base.abs() < THRESHOLD
    optimizer = SaraAdamW(net, THRESHOLD, lr=1e-3, low_rank_weight=3e-2)
    dense = torch.optim.AdamW([weight := nn.Parameter(base.clone())], lr=1e-3, weight_decay=0)
    for seed in range(5):
        x = torch.randn(3, 72, generator=torch.Generator().manual_seed(seed))
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        norm = torch.linalg.matrix_norm(weight * mask, ord="nuc")
        dense.zero_grad()
        ((x @ weight.T).square().mean() + 3e-2 * norm).backward()
        weight.grad *= mask
        dense.step()
        assert optimizer.low_rank_loss.item() == pytest.approx(3e-2 * norm.item(), rel=1e-3)
    moved = (weight - base)[mask].norm()
    assert (net.weight - weight)[mask].norm() < 0.02 * moved  # SVD against matrix products


def test_low_rank_shrinks_the_nuclear_norm_and_its_draw_has_its_own_generator():
    norms = {}
    for weight in (0.0, 0.05):
        net, optimizer, _ = pair(low_rank_weight=weight, low_rank_matrices=2, seed=3)
        state = torch.get_rng_state()
        for seed in range(20):
            loss_of(net, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(torch.get_rng_state(), state)
        base = Net()
        norms[weight] = sum(
            torch.linalg.matrix_norm(p * (b.abs() < THRESHOLD), ord="nuc").item()
            for p, b in ((net.first.weight, base.first.weight), (net.last.weight, base.last.weight))
        )
    assert norms[0.05] < 0.9 * norms[0.0]


def test_same_seed_same_result_other_seed_other_draws():
    results = []
    for seed in (1, 1, 2):
        net, optimizer, _ = pair(low_rank_weight=0.05, seed=seed)
        for step in range(5):
            loss_of(net, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(net.last.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_low_rank_gradient_is_added_once_and_can_be_clipped():
    net, optimizer, _ = pair(low_rank_weight=1.0)
    loss_of(net, 0).backward()
    before = [v.grad.clone() for v in optimizer.parameters() if v.grad is not None]
    optimizer.add_low_rank_gradient_()
    once = [v.grad.clone() for v in optimizer.parameters() if v.grad is not None]
    assert sum(not torch.equal(a, b) for a, b in zip(before, once, strict=True)) == 1
    optimizer.step()
    after = [v.grad for v in optimizer.parameters() if v.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(once, after, strict=True))
