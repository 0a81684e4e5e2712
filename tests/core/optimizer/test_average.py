"""An average of the trained values, against one kept by hand beside an optimizer without."""

import copy

import pytest
import torch

from sara_core import SaraAdamW
from sara_core.optimizer.average import decay_at

from ..helpers import LR, THRESHOLD, Net, loss_of

OPTIONS = {"lr": LR, "low_rank_weight": 1e-2, "zeros": "train"}
DECAY = 0.6


def steps(net, optimizer, seeds, after=lambda: None):
    for seed in seeds:
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
        after()


def by_hand(num_steps, dtype=torch.float32, progressive_step=0):
    """Trained values by name and position, and their average, of an optimizer that keeps none."""
    net = Net().to(dtype)
    optimizer = SaraAdamW(net, THRESHOLD, seed=1, progressive_step=progressive_step, **OPTIONS)
    averages, count = {}, 0

    def add():
        nonlocal count
        count += 1
        decay = min(DECAY, (1 + count) / (10 + count))
        for name, entry in optimizer.delta().entries.items():
            if count == 1:
                averages[name] = entry.values.double()
            else:
                averages[name] = decay * averages[name] + (1 - decay) * entry.values.double()

    steps(net, optimizer, range(num_steps), add)
    return net, averages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("progressive_step", [0, 3])
def test_the_delta_is_the_average_and_training_is_as_without(dtype, progressive_step):
    plain, averages = by_hand(8, dtype, progressive_step)
    net = Net().to(dtype)
    optimizer = SaraAdamW(
        net, THRESHOLD, seed=1, progressive_step=progressive_step, ema_decay=DECAY, **OPTIONS
    )
    steps(net, optimizer, range(8))
    for one, two in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, two)
    found = optimizer.delta().entries
    assert found.keys() == averages.keys()
    for name, expected in averages.items():
        largest = expected.abs().max()
        torch.testing.assert_close(found[name].values.double(), expected, rtol=0, atol=1e-6 * largest + 1e-7)  # fmt: skip


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_model_acts_with_the_average_and_then_with_the_trained_values_again(strength):
    base, net = Net(), Net()
    optimizer = SaraAdamW(net, THRESHOLD, ema_decay=DECAY, **OPTIONS)
    steps(net, optimizer, range(4))
    trained = [p.detach().clone() for p in net.parameters()]
    expected = dict(base.named_parameters())
    with torch.no_grad():
        for name, entry in optimizer.delta().entries.items():
            expected[name].view(-1)[entry.index.long()] += strength * entry.values
    with optimizer.at_strength(strength):
        for one, two in zip(base.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-7)
        assert any(not torch.equal(a, b) for a, b in zip(trained, net.parameters(), strict=True))
    for one, two in zip(trained, net.parameters(), strict=True):
        assert torch.equal(one, two)
    optimizer.restore()
    for one, two in zip(Net().parameters(), net.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("stop", [2, 5])
def test_an_average_goes_on_exactly(stop):
    options = {**OPTIONS, "ema_decay": DECAY, "progressive_step": 4}
    straight = Net()
    one = SaraAdamW(straight, THRESHOLD, seed=1, **options)
    steps(straight, one, range(8))
    stopped, resumed = Net(), Net()
    first = SaraAdamW(stopped, THRESHOLD, seed=1, **options)
    steps(stopped, first, range(stop))
    state = copy.deepcopy(first.state_dict())
    second = SaraAdamW(resumed, THRESHOLD, seed=5, **options)
    second.load_state_dict(state)
    steps(resumed, second, range(stop, 8))
    for name, entry in one.delta().entries.items():
        assert torch.equal(entry.values, second.delta().entries[name].values), name
    without = SaraAdamW(Net(), THRESHOLD, **OPTIONS)
    without.load_state_dict(state)
    values = {record["name"]: record["values"] for record in state["sara"]["weights"]}
    learned = without.delta().entries
    assert all("average" not in record for record in without.state_dict()["sara"]["weights"])
    if stop == 2:  # one record of each parameter
        for record in state["sara"]["weights"]:
            expected = values[record["name"]] - record["base"]
            assert torch.equal(learned[record["name"]].values, expected)


def test_a_damaged_average_is_refused():
    net = Net()
    optimizer = SaraAdamW(net, THRESHOLD, ema_decay=DECAY, **OPTIONS)
    steps(net, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["sara"]["weights"][0]["average"] = state["sara"]["weights"][0]["average"][:-1]
    with pytest.raises(ValueError, match="positions or values that do not belong together"):
        optimizer.load_state_dict(state)


def test_the_decay_begins_low():
    assert [decay_at(0.9, n) for n in (1, 8, 80, 1000)] == [2 / 11, 9 / 18, 0.9, 0.9]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_bad_decays_are_refused(decay):
    with pytest.raises(ValueError, match="expected 0 .off. or a number below 1"):
        SaraAdamW(Net(), THRESHOLD, ema_decay=decay)
