"""Saved states of the optimizer: exact when they fit, refused when they do not."""

import copy
import itertools

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW
from sara_core.optimizer import sparse_weight
from sara_core.weights import at_positions

from ..helpers import LR, THRESHOLD, Net, loss_of, pair


@pytest.mark.parametrize("from_trained_model", [False, True])
@pytest.mark.parametrize("stop", [3, 6])
def test_a_reloaded_run_continues_exactly(stop, from_trained_model, tmp_path):
    options = {"lr": LR, "low_rank_weight": 1e-2, "progressive_step": 4, "weight_decay": 0.1}

    def run(net, optimizer, steps):
        for seed in steps:
            loss_of(net, seed).backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, base = Net(), Net()
    one = SaraAdamW(straight, THRESHOLD, seed=1, **options)
    run(straight, one, range(9))

    stopped = copy.deepcopy(base)
    run(stopped, first := SaraAdamW(stopped, THRESHOLD, seed=1, **options), range(stop))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    if from_trained_model:
        base.load_state_dict(stopped.state_dict())
    second = SaraAdamW(base, fraction=0.02, lr=0.5, seed=99)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(base, second, range(stop, 9))

    for a, b in zip(straight.parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b)
    second.restore()
    for a, b in zip(Net().parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_that_does_not_fit_changes_nothing():
    net, optimizer, _ = pair()
    other = nn.Sequential(nn.Linear(80, 70))
    foreign = SaraAdamW(other, 0.05, lr=LR)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"another model: 0\.weight is missing"):
        optimizer.load_state_dict(foreign.state_dict())
    with pytest.raises(ValueError, match="not a SaraAdamW state"):
        optimizer.load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())
    after = optimizer.state_dict()
    for a, b in zip(before["sara"]["weights"], after["sara"]["weights"], strict=True):
        assert torch.equal(a["values"], b["values"])
        assert torch.equal(a["index"], b["index"])


def break_state(state, how):
    own = state["sara"]
    first = own["weights"][0]
    if how == "no generator":
        del own["generator"]
    elif how == "no groups":
        state["param_groups"] = []
    elif how == "no rates":
        del state["param_groups"][0]["betas"]
    elif how == "no moments":
        del state["state"]
    elif how == "out of range":
        first["index"] = first["index"] + 10**6
    elif how == "unsorted":
        first["index"] = first["index"].flip(0)
    elif how == "short":
        first["values"] = first["values"][:-1]
    elif how == "moments":
        state["state"][0]["exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no generator", "not a SaraAdamW state"),
        ("no groups", "moments do not fit"),
        ("no moments", "moments do not fit"),
        ("out of range", "do not belong together"),
        ("unsorted", "do not belong together"),
        ("short", "moments do not fit"),
        ("moments", "moments do not fit"),
        ("no rates", "rates are missing"),
    ],
)
def test_a_damaged_state_changes_nothing(how, message):
    net, optimizer, _ = pair()
    loss_of(net, 0).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(net.state_dict())
    break_state(state, how)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True)
    )
    loss_of(net, 1).backward()
    optimizer.step()


def test_a_state_from_another_base_is_refused():
    _, optimizer, _ = pair()
    other = SaraAdamW(Net(seed=1), THRESHOLD, lr=LR)
    with pytest.raises(ValueError, match="another base"):
        optimizer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_memory_that_runs_out_while_a_state_is_taken_over_leaves_the_base(which, monkeypatch):
    options = {"lr": LR, "low_rank_weight": 0, "ema_decay": 0.9}
    net = Net()
    optimizer = SaraAdamW(net, THRESHOLD, **options)
    loss_of(net, 0).backward()
    optimizer.step()
    state = optimizer.state_dict()

    base = Net()
    before = copy.deepcopy(base.state_dict())
    second = SaraAdamW(base, THRESHOLD, **options)
    write, calls = at_positions.write_, itertools.count()

    def run_out(*args):
        write(*args)
        if next(calls) == second_pass + which:
            raise torch.OutOfMemoryError("out of memory")

    second_pass = len(second._weights.active)  # the first puts base values back
    monkeypatch.setattr(at_positions, "write_", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        second.load_state_dict(state)
    second.restore()
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name])


def test_base_values_are_put_back_some_at_a_time(monkeypatch):
    monkeypatch.setattr(sparse_weight, "SOME", 7)
    net = Net()
    before = copy.deepcopy(net.state_dict())
    optimizer = SaraAdamW(net, THRESHOLD, lr=LR)
    loss_of(net, 0).backward()
    optimizer.step()
    assert not torch.equal(net.last.weight, before["last.weight"])
    optimizer.restore()
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
