"""Updates by other packages' optimizers, against the package itself on dense masked copies of what is learned."""

import copy
import sys

import pytest
import torch
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch import nn

from sara_core import SaraAdamW
from sara_core.files.state_file import read_state, snapshot, write_state

from ..helpers import THRESHOLD, Net, loss_of

RATES = {"prodigy": 1.0, "schedule_free": 1e-2}
STEPS = {"prodigy": 120, "schedule_free": 12}  # Prodigy begins at next to nothing
DECAY = 0.1
OPTIONS = {"low_rank_weight": 0, "weight_decay": DECAY}
BETA = 0.9


class Dense:
    """What is learned of every weight is a dense parameter that the package trains; the mask is on gradients."""

    def __init__(self, net, kind, decay):
        self.net, self.kind = net, kind
        self.names = [name for name, p in net.named_parameters() if p.dim() > 1]
        params = dict(net.named_parameters())
        self.base = {name: params[name].detach().clone() for name in self.names}
        self.masks = {name: base.float().abs() < THRESHOLD for name, base in self.base.items()}
        self.changes = {
            name: nn.Parameter(torch.zeros(int(mask.sum()))) for name, mask in self.masks.items()
        }
        common = {"lr": RATES[kind], "weight_decay": decay}
        if kind == "prodigy":
            self.inner = Prodigy(
                self.changes.values(), safeguard_warmup=True, use_bias_correction=True, **common
            )
        else:
            self.inner = AdamWScheduleFree(self.changes.values(), foreach=False, **common)
            self.inner.train()

    def step(self, seed):
        loss_of(self.net, seed).backward()
        params = dict(self.net.named_parameters())
        for name, change in self.changes.items():
            if params[name].grad is not None:
                change.grad = params[name].grad[self.masks[name]].float()
        self.inner.step()
        self.inner.zero_grad()
        self.net.zero_grad()
        self._write(params)

    @torch.no_grad()
    def _write(self, params):
        for name, change in self.changes.items():
            whole = self.base[name].clone()
            whole[self.masks[name]] += change
            params[name].copy_(whole)

    def learned(self):
        if self.kind == "schedule_free":
            self.inner.eval()
        found = {name: change.detach().clone() for name, change in self.changes.items()}
        if self.kind == "schedule_free":
            self.inner.train()
        return found


def train(net, optimizer, seeds):
    for seed in seeds:
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def made(kind, dtype=torch.float32, **options):
    net = Net().to(dtype)
    optimizer = SaraAdamW(net, THRESHOLD, optimizer=kind, lr=RATES[kind], **{**OPTIONS, **options})
    return net, optimizer


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("kind", RATES)
def test_it_learns_what_the_package_learns_on_dense_copies(kind, decay):
    net, optimizer = made(kind, weight_decay=decay)
    dense = Dense(Net(), kind, decay)
    for seed in range(STEPS[kind]):
        dense.step(seed)
        train(net, optimizer, [seed])
    expected, found = dense.learned(), optimizer.delta().entries
    largest = max(change.abs().max() for change in expected.values())
    assert largest > 5e-4
    for name in dense.names:
        if name != "unused.weight":
            torch.testing.assert_close(
                found[name].values, expected[name], rtol=0, atol=float(1e-4 * largest)
            )
    if kind == "prodigy":
        group = dense.inner.param_groups[0]
        assert group["d"] > 10 * group["d0"]  # it has found a rate by itself
        assert optimizer.rate_in_use == pytest.approx(group["d"], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("stop", [2, 5])
def test_a_saved_run_goes_on_exactly(kind, decay, dtype, stop, tmp_path):
    options = {"progressive_step": 4, "weight_decay": decay}
    straight, whole = made(kind, dtype, **options)
    train(straight, whole, range(7))
    stopped, first = made(kind, dtype, **options)
    train(stopped, first, range(stop))
    write_state(tmp_path / "state", {"optimizer": snapshot(first.state_dict())})
    resumed, second = made(kind, dtype, **options)
    second.load_state_dict(read_state(tmp_path / "state")["optimizer"])
    train(resumed, second, range(stop, 7))
    assert second.stage == 2
    for one, two in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    for name, entry in whole.delta().entries.items():
        assert torch.equal(entry.values, second.delta().entries[name].values), name
    assert second.rate_in_use == whole.rate_in_use


def test_weights_that_stop_do_so_at_the_average():
    net, optimizer = made("schedule_free", progressive_step=4)
    train(net, optimizer, range(4))
    assert optimizer._weights.frozen
    for weight in optimizer._weights.frozen:
        assert torch.equal(weight.trained, weight.average)
    before = [weight.trained.clone() for weight in optimizer._weights.frozen]
    train(net, optimizer, range(4, 7))
    for weight, values in zip(optimizer._weights.frozen, before, strict=True):
        assert torch.equal(weight.trained, values)


@pytest.mark.parametrize("kind", RATES)
def test_the_base_comes_back(kind):
    base = Net()
    net, optimizer = made(kind)
    train(net, optimizer, range(3))
    optimizer.restore()
    for one, two in zip(base.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, two)


def test_prodigys_rate_is_a_factor_of_one_by_default():
    optimizer = SaraAdamW(Net(), THRESHOLD, optimizer="prodigy", **OPTIONS)
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize(
    "options", [{"moments": "8bit"}, {"ema_decay": 0.9}, {"rates": {"first": 0.5}}]
)
@pytest.mark.parametrize("kind", RATES)
def test_what_only_adamw_knows_is_refused(kind, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is .*, which is for the optimizer adamw"):
        SaraAdamW(Net(), THRESHOLD, optimizer=kind, **options)


def test_a_state_of_another_optimizer_is_refused_and_nothing_changes():
    net, optimizer = made("prodigy")
    train(net, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    for other in ("adamw", "schedule_free"):
        fresh = Net()
        second = SaraAdamW(fresh, THRESHOLD, optimizer=other, lr=1e-3)
        with pytest.raises(ValueError, match=f"of the optimizer prodigy, but this one is {other}"):
            second.load_state_dict(state)
        for one, two in zip(Net().parameters(), fresh.parameters(), strict=True):
            assert torch.equal(one, two)
    state["state"][0]["s"] = state["state"][0]["s"][:-1]
    _, third = made("prodigy")
    with pytest.raises(ValueError, match="the saved state is damaged"):
        third.load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("prodigy", {"lr": 0.0}), ("prodigy", {"eps": 0.0}), ("schedule_free", {"betas": (0.0, 0.9)})],
)
def test_what_a_package_cannot_work_with_is_refused_before_the_model_is_touched(kind, options):
    net = Net()
    with pytest.raises(ValueError, match="above 0"):
        SaraAdamW(net, THRESHOLD, optimizer=kind, **options)
    assert all(p.requires_grad for p in net.parameters())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(ImportError, match="pip install -U prodigyopt"):
        SaraAdamW(Net(), THRESHOLD, optimizer="prodigy")
    with pytest.raises(ValueError, match="expected one of adamw, prodigy, schedule_free"):
        SaraAdamW(Net(), THRESHOLD, optimizer="lion")
