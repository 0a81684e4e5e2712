"""Rates of single weights, beside torch's dense AdamW with its updates scaled by hand."""

import dataclasses

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW, select, select_by_gradient
from sara_core.optimizer.average import decay_at
from sara_core.optimizer.weight_rates import coded, factors

from ..helpers import Net, loss_of
from .stored import stored_and_wide
from .test_gradient_selection import TO_KEEP, TO_LEARN, dense, passes

OPTIONS = {"lr": 1e-2, "low_rank_weight": 0.0}


def chosen(net, fraction=0.2):
    return select_by_gradient(net, passes(net), passes(net, TO_KEEP), fraction=fraction)


def rates_by_hand(net):
    """|g| / f of every weight, float64, by name."""
    found = {}
    learn, keep = dense(net, TO_LEARN), dense(net, TO_KEEP)
    for name, gradients in learn.items():
        harm = keep[name].double().square().sum(0)
        found[name] = gradients.double().sum(0).abs() / (harm + 1e-4 * harm.mean())
    return found


def test_a_rate_goes_with_what_is_learned_for_what_would_be_lost():
    net = Net()
    selection = chosen(net)
    assert selection.weight_rates.keys() == selection.index.keys()
    for name, rates in rates_by_hand(net).items():
        own = rates.flatten()[selection.index[name].long()]
        expected = (own / own.log().mean().exp()).clamp(1 / 8, 8)
        codes = selection.weight_rates[name]
        assert codes.dtype == torch.uint8
        torch.testing.assert_close(factors(codes).double(), expected, rtol=0.0115, atol=0)
        assert expected.max() > 1.5 * expected.min()


def test_without_anything_to_keep_all_train_at_one_rate():
    net = Net()
    assert not select_by_gradient(net, passes(net), fraction=0.2).weight_rates


@pytest.mark.parametrize("most", [1, float("inf")])
def test_rates_of_what_was_chosen_before_are_the_same(most):
    net = Net()
    selection = chosen(net)
    found = select_by_gradient(
        net, passes(net), passes(net, TO_KEEP), fraction=0.9, chosen=selection.index,
        most_bytes=most,
    )  # fmt: skip
    for name, index in selection.index.items():
        assert torch.equal(found.index[name], index)
        assert torch.equal(found.weight_rates[name], selection.weight_rates[name])
    assert found.index.keys() == selection.index.keys() == found.weight_rates.keys()


def test_what_has_no_gradient_gets_the_smallest_rate():
    octaves = torch.tensor([1.0, -float("inf"), 3.0, 2.0])
    torch.testing.assert_close(
        factors(coded(octaves, nn.Parameter(torch.zeros(2, 2)))),
        torch.tensor([0.5, 0.125, 2.0, 1.0]),
    )
    nothing = coded(torch.full((3,), -float("inf")), nn.Parameter(torch.zeros(3)))
    assert factors(nothing).tolist() == [0.125] * 3


def scaled_adamw(net, selection, steps):
    """Train a copy by dense AdamW, whose update of each weight is multiplied by its mask and factor."""
    scales = {}
    for name, index in selection.index.items():
        scale = scales[name] = torch.zeros_like(net.get_parameter(name))
        scale.view(-1)[index.long()] = factors(selection.weight_rates[name]).to(scale.dtype)
    parameters = {name: net.get_parameter(name) for name in scales}
    adamw = torch.optim.AdamW(parameters.values(), lr=OPTIONS["lr"], weight_decay=0.0)
    for step in steps:
        loss_of(net, step).backward()
        before = {name: p.detach().clone() for name, p in parameters.items()}
        adamw.step()
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name] + scales[name] * (p - before[name]))
        net.zero_grad()
    return net


def train(net, optimizer, steps):
    for step in steps:
        loss_of(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_rates_are_looked_for_only_of_what_is_there_beside_what_is_kept():
    net = Net()
    index = chosen(net).index
    with pytest.raises(ValueError, match="give keep, or leave chosen out"):
        select_by_gradient(net, passes(net), fraction=0.2, chosen=index)
    counter = []
    learn = passes(net, counter=counter)
    with pytest.raises(ValueError, match=r"names 1 parameters that are not to train.*away"):
        select_by_gradient(
            net, learn, learn, fraction=0.2, chosen={"away": torch.tensor([0], dtype=torch.int32)}
        )
    assert not counter
    only = {"first.weight": index["first.weight"]}
    found = select_by_gradient(net, passes(net), passes(net, TO_KEEP), fraction=0.2, chosen=only)
    assert found.index.keys() == found.weight_rates.keys() == only.keys()
    assert found.num_considered == sum(p.numel() for p in net.parameters() if p.dim() > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_goes_at_the_same_rates(dtype):
    """Each weight is taken back by its own rate times the decay, after what it has learned."""
    net = Net().to(dtype)
    selection = chosen(Net())
    optimizer = SaraAdamW(net, selection=selection, weight_decay=30.0, **OPTIONS)
    train(net, optimizer, (0, 1))
    before = {name: e.values for name, e in optimizer.delta().entries.items()}
    for leaf in optimizer.parameters():
        leaf.grad = torch.zeros_like(leaf)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()  # nothing moves but by decay
    optimizer.step()
    for name, entry in optimizer.delta().entries.items():
        share = (factors(selection.weight_rates[name]) * OPTIONS["lr"] * 30.0).clamp(max=1)
        expected = before[name] * (1 - share)
        torch.testing.assert_close(entry.values, expected, rtol=1e-3, atol=1e-5)
    assert share.min() < 0.2
    assert share.max() == 1


def test_an_average_is_one_of_what_moved_at_its_rates():
    net = Net()
    selection = chosen(net)
    optimizer = SaraAdamW(net, selection=selection, ema_decay=0.5, **OPTIONS)
    train(net, optimizer, (0, 1))
    once, twice = (
        dict(scaled_adamw(Net(), selection, range(count)).named_parameters()) for count in (1, 2)
    )
    base, decay = dict(Net().named_parameters()), decay_at(0.5, 2)
    for name, entry in optimizer.delta().entries.items():
        average = torch.lerp(twice[name], once[name], decay) - base[name]
        expected = average.detach().flatten()[entry.index.long()]
        torch.testing.assert_close(entry.values, expected, rtol=1e-4, atol=1e-6)
    assert 0 < decay < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_are_scaled_by_the_rates(dtype):
    net, twin = Net().to(dtype), Net().to(dtype)
    selection = chosen(net)
    optimizer = SaraAdamW(net, selection=selection, **OPTIONS)
    train(net, optimizer, range(4))
    scaled_adamw(twin, selection, range(4))
    for name in selection.index:
        torch.testing.assert_close(net.get_parameter(name), twin.get_parameter(name))
    optimizer.restore()
    assert all(map(torch.equal, net.parameters(), Net().to(dtype).parameters()))


def test_of_half_precision_weights_the_float32_values_are_scaled():
    net, wide = Net().to(torch.bfloat16), Net().to(torch.bfloat16).float()
    selection = chosen(wide)
    optimizer = SaraAdamW(net, selection=selection, **OPTIONS)
    rates = {name: factors(codes) for name, codes in selection.weight_rates.items()}
    loss_of(net, 0).backward()
    optimizer.step()
    # AdamW's first update is the rate itself, against the gradient's sign.
    for name, entry in optimizer.delta().entries.items():
        sizes = entry.values.abs()
        moved = sizes > 0
        torch.testing.assert_close(
            sizes[moved], OPTIONS["lr"] * rates[name][moved], rtol=2e-3, atol=1e-6
        )
        assert moved.float().mean() > (
            0.4 if name == "table.weight" else 0.9
        )  # half the rows were not read


@pytest.mark.parametrize("form", ["float8_e4m3fn", "scaled int8"])
def test_of_weights_in_few_bits_as_of_their_numbers(form):
    from sara_core.weights.quantised import numbers_on_use

    net, converters, wide = stored_and_wide(form)
    selection = chosen(wide)
    reference = SaraAdamW(wide, selection=selection, **OPTIONS)
    train(wide, reference, range(3))
    with numbers_on_use(net, converters, torch.float32):
        net.requires_grad_(True)
        optimizer = SaraAdamW(net, selection=selection, **OPTIONS)
        train(net, optimizer, range(3))
        entries, expected = optimizer.delta().entries, reference.delta().entries
        for name, entry in entries.items():
            torch.testing.assert_close(entry.values, expected[name].values)
        optimizer.restore()


def test_a_saved_run_goes_on_at_the_same_rates():
    net, again = Net(), Net()
    selection = chosen(net)
    optimizer = SaraAdamW(net, selection=selection, **OPTIONS)
    before_any = optimizer.state_dict()
    early = SaraAdamW(again, fraction=0.1, **OPTIONS)
    early.load_state_dict(before_any)
    train(net, optimizer, range(2))
    train(again, early, range(2))
    assert all(map(torch.equal, net.parameters(), again.parameters()))
    early.restore()
    early.detach()
    other = SaraAdamW(again, fraction=0.1, **OPTIONS)
    other.load_state_dict(optimizer.state_dict())
    train(net, optimizer, (2, 3))
    train(again, other, (2, 3))
    assert all(map(torch.equal, net.parameters(), again.parameters()))
    assert not torch.equal(net.conv.weight, Net().conv.weight)


def test_what_goes_on_after_a_second_selection_keeps_its_rates():
    net = Net()
    sizes = select(dict(net.named_parameters()), fraction=0.2)
    codes = {name: (60 + index.cumsum(0) % 130).byte() for name, index in sizes.index.items()}
    optimizer = SaraAdamW(
        net, selection=dataclasses.replace(sizes, weight_rates=codes), lr=0.05,
        low_rank_weight=0.0, progressive_step=1, biases_and_norms=True,
    )  # fmt: skip
    train(net, optimizer, (0,))
    assert optimizer.stage == 2
    left = {weight.name: weight for weight in optimizer._weights.active}
    assert any(len(weight) < len(sizes.index[name]) for name, weight in left.items())
    for name, weight in left.items():
        where = torch.isin(sizes.index[name], weight.index)
        assert torch.equal(weight.rates, codes[name][where])


@pytest.mark.parametrize("codes", [torch.zeros(3, dtype=torch.uint8), torch.ones(4)])
def test_rates_that_do_not_fit_are_refused(codes):
    net = nn.Linear(4, 4, bias=False)
    selection = select({"weight": net.weight}, fraction=0.25)
    with pytest.raises(ValueError, match=r"weight_rates do not fit its positions in \['weight'\]"):
        SaraAdamW(net, selection=dataclasses.replace(selection, weight_rates={"weight": codes}))


def test_another_optimizer_than_adamw_is_refused():
    pytest.importorskip("prodigyopt")
    net = Net()
    with pytest.raises(ValueError, match=r"selection\.weight_rates is True.*adamw"):
        SaraAdamW(net, selection=chosen(net), optimizer="prodigy")


def test_a_damaged_state_is_refused():
    net = Net()
    optimizer = SaraAdamW(net, selection=chosen(net), **OPTIONS)
    state = optimizer.state_dict()
    state["sara"]["weights"][0]["rates"] = state["sara"]["weights"][0]["rates"][1:]
    with pytest.raises(ValueError, match="positions or values that do not belong together"):
        optimizer.load_state_dict(state)
