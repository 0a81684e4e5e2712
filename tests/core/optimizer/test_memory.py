"""Bytes that training takes."""

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.optimizer.sparse_weight import SparseWeight
from sara_core.training.memory_need import LiveBytes

from ..helpers import loss_of, pair


def test_state_is_proportional_to_the_trained_weights():
    net, optimizer, _ = pair()
    loss_of(net, 0).backward()
    optimizer.step()
    trained = sum(len(v) for v in optimizer.parameters() if v.grad is not None)
    moments = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    assert sum(t.numel() for t in moments) == 2 * trained
    held = [t for r in optimizer.state_dict()["sara"]["weights"] for t in r.values()]
    held = [t for t in held if isinstance(t, torch.Tensor)]
    assert sum(t.numel() for t in held) == 3 * optimizer.num_trainable
    assert {t.dtype for t in held} == {torch.int32, torch.float32}


@pytest.mark.parametrize("step", [1, 200, 255, 256, 30_000, 40_000])
def test_positions_survive_being_kept_as_gaps(step):
    parameter = torch.nn.Parameter(torch.randn(5 * step + 7, 1))
    for index in (torch.arange(0, 5 * step, step), torch.tensor([5 * step + 6]), torch.tensor([0])):
        weight = SparseWeight("w", parameter, index.int())
        assert torch.equal(weight.index, index)
        assert weight.index.dtype == torch.int32
        assert torch.equal(weight.base, parameter.detach().flatten()[index])


def test_a_tenth_of_the_weights_costs_one_byte_a_position():
    parameter = torch.nn.Parameter(torch.randn(300, 300))
    index = torch.nonzero(torch.rand(90_000, generator=torch.Generator().manual_seed(0)) < 0.1)[
        :, 0
    ]
    weight = SparseWeight("w", parameter, index)
    kept = [t for t in vars(weight).values() if isinstance(t, torch.Tensor) and t is not parameter]
    assert sum(t.numel() * t.element_size() for t in kept) == (1 + 4 + 4) * len(index)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 17), (torch.float16, 19)])
def test_bytes_per_trained_weight(dtype, expected):
    """Gradient 4, moments 8, base 2 or 4, gap 1; the trained value 4 where the model cannot hold it."""
    torch.manual_seed(0)
    net = nn.Linear(500, 400, bias=False).to(dtype)
    optimizer = SaraAdamW(net, fraction=0.1, lr=1e-3, low_rank_weight=0)
    for _ in range(2):
        net(torch.randn(3, 500, dtype=dtype)).square().sum().backward()
        optimizer.step()
    held, seen, todo = 0, set(), [optimizer._weights.active, dict(optimizer.state)]
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            if item is net.weight:
                continue
            if item.grad is not None:
                todo.append(item.grad)
            storage = item.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held += storage.nbytes()
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            todo += item
        elif hasattr(item, "__dict__"):
            todo.append(vars(item))
    assert optimizer.num_trainable == pytest.approx(20_000, rel=0.001)  # equal magnitudes in half
    assert held / optimizer.num_trainable == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("kind", ["adamw", "schedule_free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_stage_begins_within_what_a_step_takes(kind, dtype):
    """One layer after the other, with gradients that are used up gone."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(60, 60, bias=False) for _ in range(20))).to(dtype)
    most = {}
    with LiveBytes(torch.device("cpu")) as live:
        optimizer = SaraAdamW(
            net, fraction=0.5, lr=3e-2, low_rank_weight=0, progressive_step=3, optimizer=kind
        )
        for step in range(3):
            x = torch.ones(3, 60, dtype=dtype)
            sum(layer(x).square().mean() for layer in net).backward()
            live.peak = live.now
            optimizer.step()
            most[step] = live.peak
            optimizer.zero_grad()
    assert optimizer.stage == 2
    assert 0.2 < optimizer.num_trainable / optimizer.delta().num_values < 0.95
    assert most[2] <= 1.01 * most[1]
