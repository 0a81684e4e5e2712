"""Runs that stop and go on as if they had not."""

from itertools import islice

import pytest
import torch

from sara_core.files.state_file import read_state, snapshot, write_state

from .small_run import assert_equal, make, outcome


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 11])
def test_a_stopped_run_goes_on_bit_for_bit(stop, tmp_path):
    net, run = make()
    reports = list(run)
    expected = outcome(net, run)

    _, first = make()
    before = list(islice(first, stop))
    write_state(tmp_path / "s.safetensors", snapshot(first.state()))
    net, second = make(fraction=0.2)
    second.load_state(read_state(tmp_path / "s.safetensors"))
    after = list(second)
    assert before + after == reports
    assert_equal(outcome(net, second), expected)
    second.optimizer.restore()
    assert_equal(list(net.state_dict().values()), list(make()[0].state_dict().values()))


@pytest.mark.parametrize("stop", [1, 2, 5, 9])
def test_the_loss_scale_goes_on_too(stop, tmp_path):
    def scaler():  # overflows at first, and grows into an overflow again
        return torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)

    net, run = make(scaler=scaler())
    reports = list(run)
    expected = outcome(net, run)
    assert {r.skipped for r in reports[:2]} == {True}
    assert {r.skipped for r in reports[5:]} == {True, False}

    _, first = make(scaler=scaler())
    before = list(islice(first, stop))
    write_state(tmp_path / "s.safetensors", snapshot(first.state()))
    net, second = make(scaler=torch.amp.GradScaler("cpu"))
    second.load_state(read_state(tmp_path / "s.safetensors"))
    assert before + list(second) == reports
    assert_equal(outcome(net, second), expected)
    assert second.scaler.state_dict() == run.scaler.state_dict()


def test_a_state_of_a_base_that_differs_in_its_smallest_weights_is_refused(tmp_path):
    net, run = make()
    next(iter(run))
    state = snapshot(run.state())

    def nudge_a_small_weight(model):
        weight = model[2].weight.data.view(-1)
        weight[weight.abs().argmin()] += 1e-3

    other, second = make(tweak=nudge_a_small_weight)
    before = [v.clone() for v in other.state_dict().values()]
    with pytest.raises(ValueError, match="its smallest weights differ"):
        second.load_state(state)
    assert_equal(before, list(other.state_dict().values()))


def test_loading_keeps_no_tensor_of_the_state():
    _, run = make()
    list(islice(run, 3))
    state = snapshot(run.state())
    kept = {t.data_ptr() for t in tensors_in(state)}
    _, second = make()
    second.load_state(state)
    own = {t.data_ptr() for t in tensors_in(second.optimizer.state_dict()) if t.numel()}
    assert not kept & own


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def test_more_steps_follow_their_settings_and_another_set_of_pictures_is_refused_whole():
    _, first = make()
    list(islice(first, 4))
    state = first.state()
    net, second = make(steps=20)
    second.optimizer.progressive_step = 0  # as `RunSettings.extended_by` may have it
    second.load_state(state)
    list(second)
    assert (second.step, second.optimizer.stage) == (20, 1)

    net, other = make()
    before = [tensor.clone() for tensor in net.state_dict().values()]
    with pytest.raises(ValueError, match="2 sets of pictures, but there are 1"):
        other.load_state({**state, "remaining": [[], []]})
    assert other.step == 0
    assert_equal(list(net.state_dict().values()), before)


def test_the_largest_seed_goes_on_from_a_delta():
    _, first = make()
    list(islice(first, 4))
    _, second = make(steps=16, schedule_start=12, seed=2**64 - 1)
    second.load_delta(first.optimizer.delta())
    assert next(iter(second)).step == 13
