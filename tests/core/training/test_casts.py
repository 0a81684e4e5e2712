"""Copies of weights that are made again for the backward pass instead of being kept."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from sara_core import SaraAdamW
from sara_core.optimizer import convolution
from sara_core.training import weight_casts
from sara_core.training.gradient_checkpointing import checkpointed
from sara_core.training.in_place_changes import changes_allowed


class Layer(nn.Module):
    """A layer that casts its weight when it is used, as ComfyUI's do; remembers its copies."""

    def __init__(self, kind, by_copy, *sizes):
        super().__init__()
        self.kind, self.by_copy, self.copies = kind, by_copy, []
        self.weight = nn.Parameter(torch.randn(sizes).half())
        self.bias = nn.Parameter(torch.randn(sizes[0]).half())

    def cast(self, parameter):
        if self.by_copy:
            copied = torch.empty_like(parameter, dtype=torch.float32).copy_(parameter)
        else:
            copied = parameter.to(torch.float32)
        self.copies.append(StorageWeakRef(copied.untyped_storage()))
        return copied

    def forward(self, x):
        weight, bias = self.cast(self.weight), self.cast(self.bias)
        return {
            "linear": lambda: F.linear(x, weight, bias),
            "conv": lambda: F.conv1d(x[:, None], weight, bias, padding=1).mean(1),
            "norm": lambda: F.layer_norm(x, weight.shape, weight, bias),
            "twice": lambda: F.linear(x, 2 * weight, bias),
        }[self.kind]()

    def num_kept(self):
        return sum(not copied.expired() for copied in self.copies)


def make(kind, by_copy=False):
    torch.manual_seed(0)
    sizes = {"norm": (6,), "conv": (6, 1, 3)}.get(kind, (6, 6))
    return nn.Sequential(*(Layer(kind, by_copy, *sizes) for _ in range(3)))


def gradients(net, within):
    """Return all gradients, and how many copies each layer kept until the backward pass."""
    for layer in net:
        layer.copies.clear()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with within:
        loss = net(x).sin().sum()
        kept = [layer.num_kept() for layer in net]
        loss.backward()
    found = [x.grad, *(p.grad for p in net.parameters())]
    net.zero_grad()
    return found, kept


@pytest.mark.parametrize("by_copy", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv", "norm"])
def test_no_copy_is_kept_and_gradients_are_the_same(kind, by_copy):
    net = make(kind, by_copy)
    expected, kept = gradients(net, contextlib.nullcontext())
    assert all(kept)
    for within in (weight_casts.recomputed(), changes_allowed()):
        found, kept = gradients(net, within)
        assert not any(kept)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("within", [weight_casts.recomputed, changes_allowed])
def test_a_forward_pass_without_a_backward_pass_leaves_nothing_behind(within):
    x = torch.randn(4, 6, requires_grad=True)
    with within():
        kept = make("linear")(x).softmax(1)  # whose result it saves itself
        storage = StorageWeakRef(kept.untyped_storage())
    del kept
    assert storage.expired()


def test_what_is_no_plain_copy_is_kept():
    net = make("twice")
    expected, _ = gradients(net, contextlib.nullcontext())
    found, _ = gradients(net, weight_casts.recomputed())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_activation_that_is_cast_is_kept():
    leaf = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    with weight_casts.recomputed():
        product = (leaf.float() ** 2).sum()
        expected = 2 * leaf.detach().float().double()
        leaf.data.zero_()
    product.backward()
    assert torch.equal(leaf.grad, expected)


def test_checkpointed_blocks_give_the_same_gradients():
    net = make("linear")
    expected, _ = gradients(net, contextlib.nullcontext())
    for in_place, within in ((False, weight_casts.recomputed()), (True, changes_allowed())):
        with checkpointed(net, True, in_place):
            found, kept = gradients(net, within)
        assert not any(kept)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_kernels_whose_gradient_is_made_in_parts_are_not_kept_either(monkeypatch):
    monkeypatch.setattr(convolution, "PART_ON_CPU", 30)

    class Convolution(nn.Conv2d):
        def forward(self, x):
            weight = self.weight.float()
            self.copied = StorageWeakRef(weight.untyped_storage())
            return self._conv_forward(x, weight, None)

    torch.manual_seed(0)
    net = Convolution(4, 12, 3, bias=False).half()
    exact = copy.deepcopy(net).float()
    x = torch.randn(2, 4, 7, 7, requires_grad=True)
    F.conv2d(x, exact.weight).sin().sum().backward()
    expected, x.grad = x.grad, None
    optimizer = SaraAdamW(net, 0.1, lr=1e-3, low_rank_weight=0)
    with weight_casts.recomputed():
        loss = net(x).sin().sum()
        assert net.copied.expired()
        loss.backward()
    assert torch.allclose(x.grad, expected, atol=1e-5)
    small = exact.weight.grad[exact.weight.detach().abs() < 0.1]
    assert torch.allclose(optimizer.parameters()[0].grad, small, rtol=1e-4, atol=1e-4)
