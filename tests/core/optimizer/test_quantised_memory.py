"""What is held while weights that stay in eight bits train, where, and for how long."""

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sara_core import SaraAdamW
from sara_core.optimizer import convolution
from sara_core.training.gradient_checkpointing import checkpointed
from sara_core.training.in_place_changes import changes_allowed
from sara_core.training.weight_casts import recomputed
from sara_core.weights import at_positions, codes, quantised
from sara_core.weights.quantised import Quantised, bytes_on, numbers_on_use

from .stored import (
    OPTIONS,
    assert_same_delta,
    learn,
    require_gradients,
    stored_and_wide,
)


class Deep(nn.Module):
    """Blocks of linear layers and a large convolution, whose weights outweigh everything else."""

    def __init__(self, width=64, depth=4):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.conv = nn.Conv1d(32, 32, 4)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.conv(x.view(-1, 32, 2).repeat(1, 1, 2))


class Large(TorchDispatchMode):
    """Counts the bytes of large tensors of numbers that are there at the same time."""

    def __init__(self, least):
        super().__init__()
        self.least, self.now, self.peak = least, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if Quantised in types:
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.nbytes >= self.least:
                storage = tensor.untyped_storage()
                if not getattr(storage, "is_counted", False):
                    self.count(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def count(self, storage, size):
        storage.is_counted = True
        self.now += size

        def gone():
            self.now -= size

        weakref.finalize(storage, gone)


@pytest.mark.parametrize("way", ["plain", "recomputed", "checkpointed", "in place", "changed"])
def test_at_most_one_layer_is_held_in_numbers(way, monkeypatch):
    monkeypatch.setattr(convolution, "PART_ON_CPU", 1 << 10)
    monkeypatch.setattr(codes, "CHUNK", 256)
    small, converters, wide = stored_and_wide("float8_e4m3fn", net=Deep())
    del wide
    converters = dict.fromkeys(converters, torch.detach)
    layer, most = 64 * 64 * 4, 2  # the numbers of one layer, and its gradient
    changes = {}
    if way == "changed":  # the sum beside them
        changes, most = dict.fromkeys(converters, [lambda numbers: numbers + 0.1]), 3
    with numbers_on_use(small, converters, torch.float32, changes=changes):
        require_gradients(small)
        optimizer = SaraAdamW(small, **{**OPTIONS, "low_rank_weight": 0})
        held = sum(bytes_on(torch.device("cpu"), p) for p in small.parameters())
        assert held < 2 * 8 * layer / 4
        x = torch.randn(2, 64)
        within = {"recomputed": recomputed, "in place": changes_allowed}.get(way, nullcontext)
        checkpointing = checkpointed(small, way in ("checkpointed", "in place"), way == "in place")
        with checkpointing, within(), Large(layer // 2) as large:
            loss = small(x).square().sum()
            assert large.now <= layer  # room for one, whichever it is
            loss.backward()
        assert layer <= large.peak <= most * layer
        gc.collect()
        assert large.now <= layer
        optimizer.step()


def test_what_is_stored_elsewhere_is_sent_where_it_is_used(monkeypatch):
    """The device is one without memory, which tells of every tensor that is on another."""
    monkeypatch.setattr(quantised, "SMALL", 0)
    small, converters, _ = stored_and_wide("float8_e4m3fn", net=Deep())
    device = torch.device("meta")
    for name, parameter in list(small.named_parameters()):
        if name not in converters:
            owner, _, kind = name.rpartition(".")
            there = torch.empty_like(parameter, dtype=torch.bfloat16, device=device)
            setattr(small.get_submodule(owner), kind, nn.Parameter(there))
    scales = dict.fromkeys(converters, torch.tensor(0.5))
    converters = dict.fromkeys(converters, torch.detach)
    with numbers_on_use(small, converters, torch.bfloat16, scales, device):
        require_gradients(small)
        assert sum(bytes_on(device, p) for p in small.parameters()) == sum(
            p.nbytes for name, p in small.named_parameters() if name not in converters
        )
        weight = small.blocks[0][0].weight
        index = torch.arange(0, 4096, 100, device=device)
        weight.source.learned = [SimpleNamespace(index_on=index.to, acting=index.float())]
        small(torch.randn(2, 64, dtype=torch.bfloat16, device=device)).sum().backward()
        assert (weight.grad.device, weight.grad.dtype) == (device, torch.bfloat16)
        assert at_positions.read(weight, index).device == device
        assert weight.source.stored.device.type == "cpu"


def test_frozen_weights_are_not_held_in_numbers_either(monkeypatch):
    monkeypatch.setattr(codes, "CHUNK", 256)
    small, converters, wide = stored_and_wide("float8_e5m2", net=Deep())
    reference = SaraAdamW(wide, include="blocks.0", **OPTIONS)
    x = torch.randn(2, 64)
    converters = dict.fromkeys(converters, torch.detach)
    with numbers_on_use(small, converters, torch.float32):
        require_gradients(small)
        optimizer = SaraAdamW(small, include="blocks.0", **OPTIONS)
        with Large(64 * 64 * 2) as large:
            loss = small(x).square().sum()
            assert large.now <= 64 * 64 * 4
            loss.backward()
        assert large.peak <= 2 * 64 * 64 * 4
        optimizer.step()
        wide(x).square().sum().backward()
        reference.step()
        assert_same_delta(optimizer.delta(), reference.delta())


def test_nothing_is_kept_after_training_without_the_collector():
    small, converters, _ = stored_and_wide("float8_e4m3fn")
    gc.collect()
    gc.disable()
    try:
        with numbers_on_use(small, converters, torch.float32):
            require_gradients(small)
            optimizer = SaraAdamW(small, **OPTIONS)
            learn(optimizer, small, 1)
            acting = weakref.ref(small.first.weight)
            learned = weakref.ref(optimizer._weights.active[0])
            optimizer.restore()
            del optimizer
        assert acting() is None
        assert learned() is None
    finally:
        gc.enable()
