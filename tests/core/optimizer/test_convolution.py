"""Gradients of convolutions made in parts, against torch's own dense gradients."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sara_core import SaraAdamW
from sara_core.optimizer import convolution

THRESHOLD = 0.1
OPTIONS = {"lr": 0.05, "low_rank_weight": 0}


@pytest.fixture(autouse=True)
def parts_of_two_channels(monkeypatch):
    monkeypatch.setattr(convolution, "PART_ON_CPU", 60)


class Net(nn.Module):
    """Convolutions in one, two and three dimensions, with strides, paddings and dilations."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(6, 9, 5, padding=2)
        self.two = nn.Conv2d(4, 7, 3, stride=2, padding=(1, 0), bias=False)
        self.three = nn.Conv3d(3, 5, 2, padding=1, dilation=2)
        self.activation = nn.ReLU(inplace=True)
        self.to(dtype)

    def forward(self, x):  # (2, 864)
        one = self.activation(self.one(x.view(2, 6, 144)))  # (2, 9, 144)
        two = self.two(one[:, :8].reshape(2, 4, 16, 18))  # (2, 7, 8, 8)
        return self.three(two[:, :6].reshape(2, 3, 4, 4, 8)).sin()


def inputs(dtype=torch.float64):
    return torch.randn(2, 864, generator=torch.Generator().manual_seed(1)).to(dtype)


def dense_gradients(net, backward):
    """Return torch's gradients of an untouched copy at the small weights, by name."""
    twin = copy.deepcopy(net)
    backward(twin)
    return {
        name: p.grad[p.detach().float().abs() < THRESHOLD]
        for name, p in twin.named_parameters()
        if p.dim() > 1
    }


def assert_equal_gradients(backward, net=None, atol=1e-12):
    net = Net() if net is None else net
    expected = dense_gradients(net, backward)
    optimizer = SaraAdamW(net, THRESHOLD, **OPTIONS)
    assert [name for name in optimizer.names() if _is_in_parts(net, name)], "nothing was cut"
    backward(net)
    assert all(p.grad is None for p in net.parameters())
    for name, leaf in zip(optimizer.names(), optimizer.parameters(), strict=True):
        assert len(leaf) > 20
        assert torch.allclose(leaf.grad.double(), expected[name].double(), rtol=0, atol=atol), name
    return net, optimizer


def _is_in_parts(net, name):
    return "_conv_forward" in vars(net.get_submodule(name.removesuffix(".weight")))


def test_gradients_equal_the_dense_ones():
    net, optimizer = assert_equal_gradients(lambda net: net(inputs()).square().mean().backward())
    assert all(_is_in_parts(net, name) for name in optimizer.names())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_channels_last(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 12, 3)).to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 9, 9).to(dtype).to(memory_format=torch.channels_last)
    precision = torch.finfo(dtype).eps
    assert_equal_gradients(lambda net: net(x).sin().sum().backward(), net, atol=64 * precision)


def test_backward_passes_add_up():
    def backward(net):
        for factor in (1, 2, 3):
            (net(factor * inputs()).square().mean() / 3).backward()

    assert_equal_gradients(backward)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    def backward(net):
        x = inputs().requires_grad_()
        checkpoint(net, x, use_reentrant=reentrant).square().mean().backward()

    assert_equal_gradients(backward)


def test_input_and_bias_get_their_gradients():
    net, x = Net(), inputs().requires_grad_()
    twin = copy.deepcopy(net)
    twin(x).square().mean().backward()
    expected, x.grad = x.grad, None
    optimizer = SaraAdamW(net, THRESHOLD, biases_and_norms=True, **OPTIONS)
    net(x).square().mean().backward()
    assert torch.allclose(x.grad, expected, rtol=0, atol=1e-14)
    bias = twin.one.bias
    leaf = optimizer.parameters()[optimizer.names().index("one.bias")]
    assert torch.allclose(leaf.grad, bias.grad[bias.detach().abs() < THRESHOLD], atol=1e-14)


def test_a_kernel_used_in_other_ways_too_gets_the_sum():
    def backward(net):
        x = inputs().view(2, 6, 144)
        direct = F.conv1d(x, net.one.weight, stride=3).square().mean()
        (net(inputs()).square().mean() + direct + net.one.weight.cos().mean()).backward()

    assert_equal_gradients(backward)


def test_a_kernel_shared_by_two_convolutions_gets_the_sum():
    net = Net()
    net.again = nn.Conv1d(6, 9, 5, dilation=3).double()
    net.again.weight = net.one.weight

    def backward(net):
        again = net.again(inputs().view(2, 6, 144))
        (net(inputs()).square().mean() + again.square().mean()).backward()

    assert_equal_gradients(backward, net)


def test_gradients_of_gradients_are_right():
    def backward(net):
        x = inputs().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).square().mean(), x, create_graph=True)
        (1e3 * slope.square().sum()).backward()

    net, optimizer = assert_equal_gradients(backward)
    assert optimizer.parameters()[0].grad.abs().max() > 1e-3


class Casting(nn.Conv2d):
    """Casts its weight when it is used, as ComfyUI's layers do."""

    def forward(self, x):
        copied = torch.empty_like(self.weight, dtype=x.dtype)
        weight = copied.copy_(self.weight) if self.by_copy else self.weight.to(x.dtype)
        return self._conv_forward(x, 2 * weight if self.doubles else weight, None)


@pytest.mark.parametrize("by_copy", [False, True])
@pytest.mark.parametrize("doubles", [False, True])
def test_a_half_precision_kernel_that_is_cast_when_used(by_copy, doubles):
    torch.manual_seed(0)
    net = nn.Sequential(Casting(4, 12, 3, bias=False)).half()
    net[0].by_copy, net[0].doubles = by_copy, doubles
    x = torch.randn(3, 4, 9, 9)
    exact = net[0].weight.detach().float().requires_grad_()
    F.conv2d(x, exact * (2 if doubles else 1)).sin().sum().backward()
    optimizer = SaraAdamW(net, THRESHOLD, **OPTIONS)
    net(x).sin().sum().backward()
    (leaf,) = optimizer.parameters()
    expected = exact.grad[exact.detach().abs() < THRESHOLD]
    # Only a plain copy's gradient can be taken past float16; another's is rounded on its way.
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if doubles else {"rtol": 1e-5, "atol": 1e-5}
    assert leaf.grad.dtype == torch.float32
    assert torch.allclose(leaf.grad, expected, **tolerance)
    assert doubles or not torch.equal(leaf.grad, leaf.grad.half().float())


def test_what_is_no_plain_convolution_is_left_alone():
    class Own(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return F.conv2d(input, 2 * weight, bias)

    net = nn.ModuleList([
        nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(4, 8, 3, padding_mode="reflect", padding=1),
        nn.Conv2d(4, 8, 3, padding="same"), Own(4, 8, 3), nn.ConvTranspose2d(8, 8, 3),
        nn.Conv2d(1, 8, 2), nn.Linear(40, 40),
    ])  # fmt: skip
    assert not any(convolution.is_large(module) for module in net)
    assert convolution.is_large(nn.Conv2d(4, 8, 3))


def test_inference_autocast_and_single_pictures_take_torchs_own_way():
    net = nn.Sequential(nn.Conv2d(4, 12, 3)).float()
    x = torch.randn(2, 4, 9, 9)
    twin = copy.deepcopy(net)
    optimizer = SaraAdamW(net, THRESHOLD, **OPTIONS)
    with torch.no_grad():
        assert torch.equal(net(x), twin(x))
    for run in (lambda net: net(x[0]), lambda net: _autocast(net, x)):
        for part in (net, twin):
            run(part).float().square().mean().backward()
        weight = twin[0].weight
        expected = weight.grad[weight.detach().abs() < THRESHOLD]
        assert torch.equal(optimizer.parameters()[0].grad, expected)
        optimizer.zero_grad()
        twin.zero_grad()


def _autocast(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        return net(x)


def test_convolutions_are_as_before_once_let_go():
    net = Net()
    theirs = net.two._conv_forward
    net.two._conv_forward = theirs  # a patch of someone else
    for let_go in (SaraAdamW.restore, SaraAdamW.detach):
        optimizer = SaraAdamW(net, THRESHOLD, **OPTIONS)
        assert net.two._conv_forward is not theirs
        let_go(optimizer)
        assert net.two._conv_forward is theirs
        assert "_conv_forward" not in vars(net.one) | vars(net.three)


def test_an_optimizer_nobody_holds_leaves_ordinary_convolutions_behind():
    net, twin = Net(), Net()
    SaraAdamW(net, THRESHOLD, **OPTIONS)
    gc.collect()
    for part in (net.requires_grad_(True), twin):
        part(inputs()).square().mean().backward()
    assert torch.equal(net.one.weight.grad, twin.one.weight.grad)


def test_a_copy_of_the_model_in_training_is_an_ordinary_model():
    net = Net()
    optimizer = SaraAdamW(net, THRESHOLD, **OPTIONS)
    twin = copy.deepcopy(net).requires_grad_(True)
    twin(inputs()).square().mean().backward()
    assert twin.three.weight.grad.abs().min() > 0
    assert all(leaf.grad is None for leaf in optimizer.parameters())


def test_reselecting_goes_on_with_the_parts_of_what_remains():
    net, base = Net(), Net()
    optimizer = SaraAdamW(net, THRESHOLD, progressive_step=2, **OPTIONS)
    for _ in range(2):
        optimizer.zero_grad()
        net(inputs()).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    twin = copy.deepcopy(net).requires_grad_(True)
    for part in (net, twin):
        part(inputs()).square().mean().backward()
    left = {w["name"]: w["index"].long() for w in optimizer.state_dict()["sara"]["weights"]
            if not w["frozen"]}  # fmt: skip
    for name, leaf in zip(left, optimizer.parameters(), strict=True):
        expected = twin.get_parameter(name).grad.flatten()[left[name]]
        before = int((base.get_parameter(name).abs() < THRESHOLD).sum())
        assert 0 < len(leaf) < before
        assert torch.allclose(leaf.grad, expected, rtol=0, atol=1e-12)
