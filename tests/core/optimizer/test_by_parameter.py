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
    caplog.clear()
    everything = select(weights, fraction=0.1, zeros="train")
    assert len(everything.index["zeros"]) == 400  # none of them can be told from the others
    assert len(everything.index["half"]) == 200
    assert [record.getMessage() for record in caplog.records] == [
        "600 of the smallest weights are equal, as exact zeros are, and more than the 80 that are to train; "
        "all of them train"
    ]


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


LEVELS = torch.tensor([0.1] * 4 + [0.2] * 10 + [0.5] * 86).view(10, 10)


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 14), (0.05, 4), (0.02, 4), (0.5, 14), (0.6, 100)])  # fmt: skip
def test_equal_weights_are_taken_if_that_comes_nearer_to_the_share(fraction, count):
    found = select({"levels": LEVELS}, fraction=fraction)
    assert len(found.index["levels"]) == count
    assert found.own_thresholds["levels"] > LEVELS.flatten()[count - 1]


def test_equal_weights_are_told_of(caplog):
    select({"levels": LEVELS, "other": torch.randn(10, 10)}, fraction=0.1)
    assert not caplog.records
    select({"levels": LEVELS, "other": torch.randn(10, 10)}, fraction=0.02)
    assert "4 of the smallest weights are equal" in caplog.text
    caplog.clear()
    found = select({"same": torch.ones(10, 10), "other": torch.randn(10, 10)}, fraction=0.1)
    assert list(found.index) == ["other"]
    assert "1 layers do not train, as too many of their weights are equal: same" in caplog.text
    with pytest.raises(ValueError, match="none of 100 can be told from most others of its layer"):
        select({"same": torch.ones(10, 10)}, fraction=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fraction", [0.003, 0.1, 0.7, 1.0])
def test_each_share_is_the_nearest_that_sorting_finds(dtype, fraction):
    torch.manual_seed(4)
    weights = {"a": torch.randn(20, 30), "b": torch.randn(8, 4, 3, 3), "c": torch.randn(7, 1)}
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    found = select(weights, fraction=fraction)
    for name, weight in weights.items():
        sizes = weight.float().abs().flatten()
        possible = [int((sizes <= level).sum()) for level in sizes.unique()]
        wanted = max(1, round(fraction * len(sizes)))
        nearest = min(possible, key=lambda count: (abs(count - wanted), count))
        assert len(found.index[name]) == nearest
