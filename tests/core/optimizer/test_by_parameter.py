"""The smallest weights of each parameter, by a threshold of its own, against sorting and a dense reference."""

import copy

import pytest
import torch

from sara_core import SaraAdamW, select

from ..helpers import LR, Net, loss_of

FRACTION = 0.2


def matrices(net):
    return {name: p for name, p in net.named_parameters() if p.dim() > 1}


def limits_of(parameters):
    """By sorting: the smallest magnitude that is left out of each."""
    return {
        name: p.detach().abs().flatten().sort().values[round(FRACTION * p.numel())].item()
        for name, p in parameters.items()
    }


def test_each_parameter_gives_the_same_share():
    net = Net()
    with torch.no_grad():
        net.first.weight.mul_(10)
    parameters = matrices(net)
    found = select(parameters, fraction=FRACTION)
    assert found.own_thresholds == limits_of(parameters)
    for name, p in parameters.items():
        expected = (p.detach().abs() < found.own_thresholds[name]).flatten().nonzero()[:, 0]
        assert torch.equal(found.index[name].long(), expected)
        assert len(expected) == round(FRACTION * p.numel())
    of_all = select(parameters, fraction=FRACTION, by_parameter=False)
    assert found.threshold == of_all.threshold
    assert not of_all.own_thresholds
    assert not set(of_all.index) - set(found.index)
    shares = [len(i) / parameters[name].numel() for name, i in of_all.index.items()]
    assert max(shares) > 1.2 * FRACTION  # as first.weight has hardly any small ones


@pytest.mark.parametrize("rule", [{"threshold": 0.1}, {"num_trainable": 50}])
def test_other_rules_are_for_all_parameters_together(rule):
    parameters = matrices(Net())
    found = select(parameters, **rule)
    assert not found.own_thresholds
    everything = torch.cat([p.detach().abs().flatten() for p in parameters.values()])
    assert found.num_selected == rule.get("num_trainable", int((everything < 0.1).sum()))


def test_parameters_of_zeros_take_nothing_unless_zeros_train(caplog):
    weights = {"a": torch.randn(20, 20), "zeros": torch.zeros(20, 20), "half": torch.randn(20, 20)}
    weights["half"].flatten()[:200] = 0
    found = select(weights, fraction=0.1)
    assert {name: len(index) for name, index in found.index.items()} == {"a": 40, "half": 20}
    assert "600 of 1200 weights are exactly zero" in caplog.text
    assert "most of the selection in their layers" in caplog.text
    assert found.zeros_skipped
    assert not (weights["half"].flatten()[found.index["half"].long()] == 0).any()
    everything = select(weights, fraction=0.1, zeros="train")
    assert {name: len(index) for name, index in everything.index.items()} == dict.fromkeys(
        weights, 40
    )
    as_many = weights["half"].abs().flatten().sort().values[200 + 40]  # as zeros train lie below
    limit = everything.own_thresholds["half"]
    assert as_many * (1 - 2**-7) <= limit <= as_many
    assert everything.own_thresholds["zeros"] > 1e38  # any size is as small as another there


@pytest.mark.parametrize("rule", [{"threshold": 0.1}, {"num_trainable": 5}])
def test_it_goes_by_fraction(rule):
    with pytest.raises(ValueError, match="give fraction alone"):
        select({"w": torch.randn(4, 4)}, by_parameter=True, **rule)


def test_it_trains_as_masked_adamw_and_each_goes_on_below_its_own_threshold():
    """Every weight moves by about the rate, so some leave their threshold on the way."""
    net = Net()
    parameters, base = matrices(net), copy.deepcopy(net)
    limits = limits_of(parameters)
    reference = copy.deepcopy(net)
    dense = matrices(reference)
    masks = {name: p.detach().abs() < limits[name] for name, p in dense.items()}
    adamw = torch.optim.AdamW(dense.values(), lr=LR, weight_decay=0.0)
    optimizer = SaraAdamW(net, fraction=FRACTION, lr=LR, low_rank_weight=0, progressive_step=3)
    for step in range(6):
        if step == 3:
            masks = {name: mask & (dense[name].detach().abs() < limits[name]) for name, mask in masks.items()}  # fmt: skip
        loss_of(reference, step).backward()
        before = {name: p.detach().clone() for name, p in dense.items()}
        for name, p in dense.items():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad * masks[name]
        adamw.step()
        with torch.no_grad():  # those that stopped keep their value, whatever their moments say
            for name, p in dense.items():
                p.copy_(torch.where(masks[name], p, before[name]))
        reference.zero_grad()
        loss_of(net, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.stage == 2
    assert optimizer.num_trainable == sum(int(m.sum()) for n, m in masks.items() if "unused" not in n) + int(masks["unused.weight"].sum())  # fmt: skip
    stopped = sum(round(FRACTION * p.numel()) for p in dense.values()) - optimizer.num_trainable
    assert stopped > 100
    for name, p in dense.items():
        torch.testing.assert_close(parameters[name], p, rtol=0, atol=1e-6)
    assert "sara.threshold" not in optimizer.delta_metadata()
    optimizer.restore()
    for one, two in zip(base.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_saved_run_keeps_its_thresholds():
    options = {"lr": LR, "low_rank_weight": 0, "progressive_step": 4}

    def steps(net, optimizer, seeds):
        for seed in seeds:
            loss_of(net, seed).backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, stopped, resumed = Net(), Net(), Net()
    one = SaraAdamW(straight, fraction=FRACTION, **options)
    steps(straight, one, range(6))
    first = SaraAdamW(stopped, fraction=FRACTION, **options)
    steps(stopped, first, range(2))
    second = SaraAdamW(resumed, fraction=0.05, **options)  # takes over everything
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(resumed, second, range(2, 6))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("zeros", ["auto", "skip", "train"])
@pytest.mark.parametrize("fraction", [0.003, 0.1, 0.7, 1.0])
def test_each_share_is_exact_by_sorting_whatever_is_equal(dtype, zeros, fraction):
    torch.manual_seed(4)
    weights = {"a": torch.randn(20, 30), "b": torch.randn(8, 4, 3, 3), "c": torch.randn(7, 1) + 3}
    weights = {name: (4 * weight).to(dtype).float() for name, weight in weights.items()}
    weights["same"] = torch.full((10, 10), -0.5)
    found = select(weights, fraction=fraction, zeros=zeros)
    for name, weight in weights.items():
        sizes = weight.abs().flatten()
        num_zeros, wanted = int((sizes == 0).sum()), max(1, round(fraction * len(sizes)))
        skipped = zeros == "skip" or (zeros == "auto" and num_zeros > wanted / 2)
        pool = sizes[sizes > 0] if skipped else sizes
        wanted = max(1, round(fraction * len(pool)))
        chosen = sizes[found.index[name].long()]
        assert torch.equal(chosen.sort().values, pool.sort().values[:wanted]), name


def q4(weight):
    """As Q4_0 stores it: codes of -8 to 7 with one scale for 32, which make a tenth of all zero."""
    blocks = weight.view(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 8
    return ((blocks / scale).round().clamp(-8, 7) * scale).view_as(weight)


FORMS = {
    "float32": lambda w: w,
    "float8": lambda w: w.to(torch.float8_e4m3fn).float(),
    "half pruned": lambda w: w.masked_fill(torch.rand_like(w) < 0.5, 0.0),
    "Q4_0": q4,
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("by_parameter", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_weights_at_the_border_and_zeros_go_on_in_the_second_stage(form, by_parameter):
    torch.manual_seed(0)
    of_rows = torch.logspace(-2, 0, 64)[:, None]  # of unequal size, as in real layers
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
    )
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(FORMS[form](torch.randn(64, 64) * 0.02 * of_rows))
    optimizer = SaraAdamW(
        net, fraction=0.1, lr=2e-6, low_rank_weight=0, zeros="train", by_parameter=by_parameter
    )
    for _ in range(10):
        loss = (net(torch.randn(16, 64)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = optimizer.num_trainable
    optimizer.reselect()
    assert optimizer.stage == 2
    assert optimizer.num_trainable > 0.9 * before  # none has moved by more than 2e-5
