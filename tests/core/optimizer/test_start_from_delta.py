"""An optimizer that goes on from a delta, against one whose moments were thrown away."""

import copy

import pytest
import torch

from sara_core import SaraAdamW, SparseDelta

from ..helpers import LR, THRESHOLD, Net, loss_of

OPTIONS = {"lr": LR, "low_rank_weight": 0, "zeros": "train"}


def steps(net, optimizer, seeds):
    for seed in seeds:
        loss_of(net, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def learned(progressive_step=0, dtype=torch.float32):
    net = Net().to(dtype)
    base = copy.deepcopy(net)
    optimizer = SaraAdamW(net, THRESHOLD, progressive_step=progressive_step, **OPTIONS)
    steps(net, optimizer, range(4))
    return base, net, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_as_with_new_moments(dtype, tmp_path):
    base, net, first = learned(dtype=dtype)
    first.delta().save(tmp_path / "d.safetensors", torch.float32)
    second = SaraAdamW(base, THRESHOLD, **OPTIONS)
    second.start_from(SparseDelta.load(tmp_path / "d.safetensors"), 4)
    assert second.num_steps == 4
    tolerance = {"rtol": 0, "atol": 1e-7 if dtype == torch.float32 else 1e-3}
    for one, two in zip(net.parameters(), base.parameters(), strict=True):
        assert torch.allclose(one.float(), two.float(), **tolerance)
    first.state.clear()
    steps(net, first, range(4, 7))
    steps(base, second, range(4, 7))
    found, expected = second.delta(), first.delta()
    assert found.metadata["sara.steps"] == "7"
    for name, entry in expected.entries.items():
        assert torch.allclose(found.entries[name].values, entry.values, atol=1e-5), name
    second.restore()
    for one, two in zip(Net().to(dtype).parameters(), base.parameters(), strict=True):
        assert torch.equal(one, two)


def test_after_the_switch_only_small_weights_go_on():
    base, net, first = learned(progressive_step=4)
    delta = first.delta()
    second = SaraAdamW(base, THRESHOLD, progressive_step=4, **OPTIONS)
    second.start_from(delta, 4)
    assert second.stage == 2
    assert second.num_trainable == first.num_trainable
    fresh = SaraAdamW(Net(), THRESHOLD, progressive_step=9, **OPTIONS)
    fresh.start_from(delta, 4)
    assert fresh.stage == 1


def test_what_does_not_fit_changes_nothing():
    _, _, first = learned()
    delta = first.delta()
    other = Net(seed=3)
    cases = [
        (
            Net(),
            {"threshold": THRESHOLD / 4},
            r"the delta changes \d+ weights that are not selected",
        ),
        (Net(), {"fraction": 0.1}, r"a threshold was selected .* \(by_parameter=False\)"),
        (Net(), {"threshold": THRESHOLD, "exclude": "last"}, "weights that are not selected"),
        (other, {"fraction": 1.0}, "another base than this model holds"),
    ]
    for net, options, message in cases:
        optimizer = SaraAdamW(net, **options, **OPTIONS)
        before = copy.deepcopy(net)
        with pytest.raises(ValueError, match=message):
            optimizer.start_from(delta)
        assert optimizer.num_steps == 0
        for one, two in zip(net.parameters(), before.parameters(), strict=True):
            assert torch.equal(one, two)
    with pytest.raises(ValueError, match="4 steps are made already"):
        first.start_from(delta)
