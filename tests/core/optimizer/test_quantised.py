"""Weights that stay in eight bits are trained to the very same numbers as those they stand for."""

import copy
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
from sara_core.weights import at_positions, codes
from sara_core.weights.quantised import Quantised, bytes_on, numbers_on_use

from ..helpers import Net, loss_of, sample

OPTIONS = {"fraction": 0.2, "lr": 1e-2, "zeros": "train", "low_rank_weight": 1e-2}


def as_float(stored):
    return stored.float()


def scaled(dtype, largest):
    def store(weight):
        scale = weight.detach().abs().max() / largest
        stored = weight.detach() / scale
        stored = stored.round() if dtype == torch.int8 else stored
        return stored.to(dtype), lambda stored: stored.float() * scale

    return store


FORMS = {
    "float8_e4m3fn": lambda w: (w.detach().to(torch.float8_e4m3fn), as_float),
    "float8_e5m2": lambda w: (w.detach().to(torch.float8_e5m2), as_float),
    "scaled float8": scaled(torch.float8_e4m3fn, 448),
    "scaled int8": scaled(torch.int8, 127),
    "float16": lambda w: (w.detach().half(), lambda stored: stored),
}


def stored_and_wide(form, dtype=torch.float32, net=None):
    """A model with its matrices stored in a form, what makes numbers of them, and one made of those."""
    small = Net() if net is None else net
    wide, converters = copy.deepcopy(small).to(dtype), {}
    for path, module in small.named_modules():
        for name, weight in list(module._parameters.items()):
            if weight is None or weight.dim() < 2:
                continue
            stored, convert = FORMS[form](weight)
            full_name = f"{path}.{name}" if path else name
            converters[full_name] = convert
            module._parameters[name] = nn.Parameter(stored, requires_grad=False)
            wide.get_submodule(path)._parameters[name] = nn.Parameter(convert(stored).to(dtype))
    for name, parameter in small.named_parameters():
        if name not in converters:
            parameter.data = parameter.data.to(dtype)
    return small, converters, wide


def bytes_of(net):
    return {n: p.detach().clone().view(torch.uint8) for n, p in net.named_parameters()}


def require_gradients(net):
    for parameter in net.parameters():
        parameter.requires_grad_(True)


def learn(optimizer, net, steps, loss=loss_of, first=0):
    for seed in range(first, first + steps):
        loss(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_delta(found, expected):
    assert found.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        assert torch.equal(found.entries[name].index, entry.index), name
        assert torch.equal(found.entries[name].values, entry.values), name


@pytest.mark.parametrize("options", [{}, {"progressive_step": 3}, {"weight_decay": 0.5}, {"max_grad_norm": 0.01}])  # fmt: skip
@pytest.mark.parametrize("form", FORMS)
def test_the_delta_is_that_of_training_the_numbers(form, options):
    small, converters, wide = stored_and_wide(form)
    before, parameters = bytes_of(small), dict(small.named_parameters())
    reference = SaraAdamW(wide, **OPTIONS, **options)
    learn(reference, wide, 6)
    with numbers_on_use(small, converters, torch.float32):
        require_gradients(small)
        optimizer = SaraAdamW(small, **OPTIONS, **options)
        assert optimizer.threshold == reference.threshold
        learn(optimizer, small, 6)
        assert optimizer.stage == reference.stage == (2 if "progressive_step" in options else 1)
        assert_same_delta(optimizer.delta(), reference.delta())
        assert max(e.values.abs().max() for e in optimizer.delta().entries.values()) > 0.01
        x = sample(9)
        assert torch.equal(small(*x), wide(*x))
        with optimizer.at_strength(0.5), reference.at_strength(0.5):
            assert torch.equal(small(*x), wide(*x))
        assert torch.equal(small(*x), wide(*x))
        optimizer.restore()
        reference.restore()
        assert torch.equal(small(*x), wide(*x))
        assert_same_delta(optimizer.delta(), reference.delta())
    for name, parameter in small.named_parameters():
        assert parameter is parameters[name]
    for name, value in bytes_of(small).items():
        assert torch.equal(value, before[name]), name


def test_training_in_bfloat16_is_that_of_the_numbers_in_bfloat16():
    small, converters, wide = stored_and_wide("scaled float8", torch.bfloat16)
    reference = SaraAdamW(wide, **OPTIONS)
    learn(reference, wide, 3)
    with numbers_on_use(small, converters, torch.bfloat16):
        require_gradients(small)
        optimizer = SaraAdamW(small, **OPTIONS)
        learn(optimizer, small, 3)
        assert_same_delta(optimizer.delta(), reference.delta())


def test_a_run_goes_on_exactly_and_its_state_is_that_of_the_numbers():
    small, converters, wide = stored_and_wide("scaled float8")
    whole = SaraAdamW(wide, progressive_step=3, **OPTIONS)
    learn(whole, wide, 3)
    state = copy.deepcopy(whole.state_dict())
    learn(whole, wide, 3, first=3)
    with numbers_on_use(small, converters, torch.float32):
        require_gradients(small)
        optimizer = SaraAdamW(small, progressive_step=3, **OPTIONS)
        learn(optimizer, small, 1, first=7)
        optimizer.load_state_dict(state)
        own = optimizer.state_dict()["sara"]["weights"]
        for found, expected in zip(own, state["sara"]["weights"], strict=True):
            for what in ("index", "base", "values"):
                assert torch.equal(found[what], expected[what])
        learn(optimizer, small, 3, first=3)
        assert_same_delta(optimizer.delta(), whole.delta())
        optimizer.restore()
        other = SaraAdamW(small, **OPTIONS)
        other.start_from(whole.delta())
        x = sample(9)
        torch.testing.assert_close(small(*x), wide(*x), rtol=0, atol=1e-6)


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


@pytest.mark.parametrize("way", ["plain", "recomputed", "checkpointed", "in place"])
def test_at_most_one_layer_is_held_in_numbers(way, monkeypatch):
    monkeypatch.setattr(convolution, "PART_ON_CPU", 1 << 10)
    monkeypatch.setattr(codes, "CHUNK", 256)
    small, converters, wide = stored_and_wide("float8_e4m3fn", net=Deep())
    del wide
    converters = dict.fromkeys(converters, torch.detach)
    with numbers_on_use(small, converters, torch.float32):
        require_gradients(small)
        optimizer = SaraAdamW(small, **{**OPTIONS, "low_rank_weight": 0})
        layer = 64 * 64 * 4
        held = sum(bytes_on(torch.device("cpu"), p) for p in small.parameters())
        assert held < 2 * 8 * layer / 4
        x = torch.randn(2, 64)
        within = {"recomputed": recomputed, "in place": changes_allowed}.get(way, nullcontext)
        checkpointing = checkpointed(small, way in ("checkpointed", "in place"), way == "in place")
        with checkpointing, within(), Large(layer // 2) as large:
            loss = small(x).square().sum()
            assert large.now <= layer  # room for one, whichever it is
            loss.backward()
        # the numbers of one layer, and its gradient
        assert layer <= large.peak <= 2 * layer
        gc.collect()
        assert large.now <= layer
        optimizer.step()


def test_what_is_stored_elsewhere_is_sent_where_it_is_used():
    """The device is one without memory, which tells of every tensor that is on another."""
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
        weight.source.learned = [SimpleNamespace(index=index, acting=index.float())]
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


def test_two_weights_in_one_operation_have_numbers_of_their_own():
    net = nn.Module()
    net.one, net.two = (nn.Parameter(torch.randn(5, 5).to(torch.float8_e5m2)) for _ in range(2))
    expected = net.one.float() @ net.two.float()
    with numbers_on_use(net, {"one": as_float, "two": as_float}, torch.float32), torch.no_grad():
        assert torch.equal(net.one @ net.two, expected)


def test_shared_weights_stay_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.out = nn.Embedding(9, 6), nn.Linear(6, 9)
            self.out.weight = self.table.weight

        def forward(self, word):
            return self.out(self.table(word))

    net = Tied()
    stored = nn.Parameter(net.table.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    net.table.weight = net.out.weight = stored
    wide = copy.deepcopy(net)
    wide.table.weight = wide.out.weight = nn.Parameter(stored.detach().float())
    word = torch.arange(9)
    converters = {"table.weight": as_float, "out.weight": as_float}
    reference = SaraAdamW(wide, **OPTIONS)
    learn(reference, wide, 3, lambda net, seed: net(word).square().sum())
    with numbers_on_use(net, converters, torch.float32):
        assert net.table.weight is net.out.weight
        require_gradients(net)
        optimizer = SaraAdamW(net, **OPTIONS)
        learn(optimizer, net, 3, lambda net, seed: net(word).square().sum())
        assert_same_delta(optimizer.delta(), reference.delta())
    assert net.table.weight is net.out.weight is stored


def test_a_preview_may_come_before_the_first_step():
    small, converters, wide = stored_and_wide("scaled float8")
    reference = SaraAdamW(wide, **OPTIONS)
    with numbers_on_use(small, converters, torch.float32):
        require_gradients(small)
        optimizer = SaraAdamW(small, **OPTIONS)
        for seed in range(2):
            with torch.inference_mode():
                assert torch.equal(small(*sample(9)), wide(*sample(9)))
            learn(optimizer, small, 1, first=seed)
            learn(reference, wide, 1, first=seed)
        assert_same_delta(optimizer.delta(), reference.delta())


def test_a_quantised_weight_refuses_to_be_written():
    small, converters, _ = stored_and_wide("float8_e4m3fn")
    with numbers_on_use(small, converters, torch.float32):
        with (
            torch.no_grad(),
            pytest.raises(RuntimeError, match="keeps as it is stored"),
        ):
            small.first.weight.add_(1)


def test_stored_weights_are_put_back_after_an_error():
    small, converters, _ = stored_and_wide("float8_e4m3fn")
    before, parameters = bytes_of(small), dict(small.named_parameters())

    def interrupt(net, seed):
        if seed == 2:
            raise KeyboardInterrupt
        return loss_of(net, seed)

    def interrupted():
        with numbers_on_use(small, converters, torch.float32):
            require_gradients(small)
            learn(SaraAdamW(small, **OPTIONS), small, 3, interrupt)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for name, parameter in small.named_parameters():
        assert parameter is parameters[name]
    assert all(torch.equal(value, before[name]) for name, value in bytes_of(small).items())


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


def test_what_another_optimizer_has_left_in_the_model_is_not_lost_silently():
    small, converters, _ = stored_and_wide("float8_e4m3fn")
    with numbers_on_use(small, converters, torch.float32):
        require_gradients(small)
        first = SaraAdamW(small, **OPTIONS)
        learn(first, small, 2)
        first.detach()
        x = sample(9)
        with torch.no_grad():
            learned = small(*x)
        require_gradients(small)
        with pytest.raises(RuntimeError, match="another SaraAdamW has learned"):
            SaraAdamW(small, **OPTIONS)
        assert torch.equal(small(*x), learned)
        first.restore()
        learn(SaraAdamW(small, **OPTIONS), small, 1)


def test_the_state_of_a_half_precision_run_goes_on_where_its_numbers_act():
    """As runs had it that were begun when half-precision weights trained in place."""
    small, converters, wide = stored_and_wide("float16")
    half = copy.deepcopy(wide).half()
    old = SaraAdamW(half, **OPTIONS)
    learn(old, half, 2)
    state = copy.deepcopy(old.state_dict())
    assert state["sara"]["weights"][0]["base"].dtype == torch.float16
    with numbers_on_use(small, converters, torch.float32):
        require_gradients(small)
        optimizer = SaraAdamW(small, **OPTIONS)
        optimizer.load_state_dict(state)
        assert_same_delta(optimizer.delta(), old.delta())
        learn(optimizer, small, 1)
        other, others, _ = stored_and_wide("float16", net=Net(seed=1))
        with numbers_on_use(other, others, torch.float32):
            require_gradients(other)
            with pytest.raises(ValueError, match="another base"):
                SaraAdamW(other, **OPTIONS).load_state_dict(state)


def test_a_cast_to_a_wider_dtype_is_of_the_numbers():
    small, converters, _ = stored_and_wide("scaled float8")
    with numbers_on_use(small, converters, torch.bfloat16):
        weight = small.first.weight.detach()
        assert torch.equal(weight.float(), weight.clone().float())
        assert isinstance(weight.to(torch.bfloat16), Quantised)
