"""Weights that stay in eight bits are trained to the very same numbers as those they stand for."""

import copy

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.weights.quantised import Quantised, numbers_on_use

from ..helpers import Net, loss_of, sample
from .stored import (
    FORMS,
    OPTIONS,
    as_float,
    assert_same_delta,
    bytes_of,
    learn,
    require_gradients,
    stored_and_wide,
)


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


@pytest.mark.parametrize("form", ["scaled float8", "float32"])
def test_what_a_layer_adds_to_its_weight_is_part_of_the_numbers(form):
    small, converters, wide = stored_and_wide(form)
    added = {name: torch.randn_like(wide.get_parameter(name)) / 50 for name in converters}
    for name, change in added.items():
        wide.get_parameter(name).data += change
    reference = SaraAdamW(wide, **OPTIONS)
    learn(reference, wide, 3)
    changes = {name: [change.__radd__] for name, change in added.items()}
    with numbers_on_use(small, converters, torch.float32, changes=changes):
        require_gradients(small)
        optimizer = SaraAdamW(small, **OPTIONS)
        learn(optimizer, small, 3)
        assert optimizer.fingerprint == reference.fingerprint
        assert_same_delta(optimizer.delta(), reference.delta())
        x = sample(9)
        assert torch.equal(small(*x), wide(*x))
        optimizer.restore()
        reference.restore()
        assert torch.equal(small(*x), wide(*x))


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


def test_stored_weights_are_not_written_to_one_by_one_or_in_lists():
    small, converters, _ = stored_and_wide("float8_e4m3fn")
    before = bytes_of(small)
    with numbers_on_use(small, converters, torch.float32), torch.no_grad():
        weights = [p for p in small.parameters() if isinstance(p, Quantised)]
        for change in (lambda: weights[0].mul_(2.0), lambda: torch._foreach_mul_(weights, 2.0)):
            with pytest.raises(RuntimeError, match="keeps as it is stored"):
                change()
    after = bytes_of(small)
    assert all(torch.equal(after[name], value) for name, value in before.items())
