"""Models that change their activations in place: noticed, and trained with the right gradients."""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from sara_core.training.gradient_checkpointing import checkpointed
from sara_core.training.in_place_changes import changes_allowed, changes_saved_tensors


@dataclass
class Modulation:
    scale: torch.Tensor


class Block(nn.Module):
    """A residual block as Flux has it: `img += ...` after `img` was saved by the norm."""

    def __init__(self, in_place):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.in_place = in_place

    def forward(self, img, options, vec=None):
        for layer in (self.first, self.second):
            change = vec.scale * torch.tanh(layer(self.norm(img)))
            if self.in_place:
                img += change
            else:
                img = img + change
        return img


class Net(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.to_vec = nn.Linear(4, 6)
        self.positions = nn.Identity()  # nothing to train before it or in it
        self.blocks = nn.ModuleList(Block(in_place) for _ in range(3))

    def forward(self, x):
        img, vec = self.inner(x), Modulation(self.to_vec(x))
        for block in self.blocks:
            img = block(img, {"sigmas": x[:, 0]}, vec=vec)
        return img + self.positions(x[:, :1])


def make(in_place, seed=0):
    torch.manual_seed(seed)
    return Net(in_place).double(), torch.randn(5, 4, dtype=torch.float64)


def gradients(net, x, first_layer=True):
    net.inner.requires_grad_(first_layer)
    net.to_vec.requires_grad_(first_layer)
    net.zero_grad()
    net(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def test_only_changes_of_what_is_saved_are_noticed():
    assert changes_saved_tensors(lambda: Net(True)(torch.randn(5, 4)))
    assert not changes_saved_tensors(lambda: Net(False)(torch.randn(5, 4)))
    weight = torch.randn(4, requires_grad=True)

    def adds_to_what_no_one_needs():
        total = torch.zeros(4)
        total += weight * 2  # a product's result is not saved
        return total.mul_(3)

    def writes_where_a_saved_tensor_has_been():
        for _ in range(3):
            torch.zeros(1000).mul_(2)
            (weight * torch.ones(4)).sum()

    def writes_into_a_view():
        x = weight * 2
        y = x.exp()  # saves its result
        y[1:3].zero_()

    assert not changes_saved_tensors(adds_to_what_no_one_needs)
    assert not changes_saved_tensors(writes_where_a_saved_tensor_has_been)
    assert changes_saved_tensors(writes_into_a_view)


def test_looking_keeps_nothing_and_draws_nothing():
    net, x = make(True)
    state = torch.get_rng_state()
    assert changes_saved_tensors(lambda: net(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("first_layer", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_those_of_the_model_that_changes_nothing(checkpointing, first_layer):
    expected = gradients(*make(False), first_layer)
    net, x = make(True)
    with (
        checkpointed(net, checkpointing, in_place=True),
        changes_allowed(),
    ):
        found = gradients(net, x, first_layer)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-12, atol=1e-14), name


def test_without_care_they_fail_or_are_wrong():
    expected = gradients(*make(False))
    net, x = make(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(net, x)
    with checkpointed(net, True), contextlib.suppress(RuntimeError):
        found = gradients(net, x)
        name = "blocks.0.first.weight"
        assert not torch.allclose(found[name], expected[name])


def test_a_change_through_a_view_that_begins_further_on():
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def run(in_place):
        x = weight * 2
        y = x.exp()  # saves its result
        z = x.sin()  # saves x
        if in_place:
            y[2:4].mul_(3)
            x[3:] += 1
            torch._foreach_add_([x], 1.0)
        else:
            y = torch.cat([y[:2], y[2:4] * 3, y[4:]])
            x = torch.cat([x[:3], x[3:] + 1]) + 1
        return torch.autograd.grad((x * y * z).sum(), weight)[0]

    expected = run(False)
    with changes_allowed():
        found = run(True)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_copies_are_made_only_of_what_is_still_needed():
    weight = torch.randn(1000, requires_grad=True)
    with changes_allowed():
        for _ in range(3):
            (weight * torch.ones(1000)).sum().backward()  # its graph is gone before the write
            weight.grad.zero_()
        x = weight * 2
        x.sin()  # saves x, and is let go of
        before = x.data_ptr()
        x += 1
        assert x.data_ptr() == before
