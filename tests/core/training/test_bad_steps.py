"""Steps that fail: not finite, out of memory, an error within."""

import pytest
import torch

from sara_core.files.state_file import read_state, snapshot, write_state
from sara_core.training.out_of_memory import is_out_of_memory
from sara_core.training.trainer import MAX_BAD_STEPS

from .small_run import assert_equal, make, outcome


def test_state_after_an_error_within_a_step_is_that_of_the_last_whole_step(tmp_path):
    net, run = make()
    list(run)
    expected = outcome(net, run)
    calls = [0]

    def fail(count):
        calls[0] += 1
        if calls[0] == 10:  # the second pass of step 5
            raise KeyboardInterrupt

    _, broken = make(fail)
    with pytest.raises(KeyboardInterrupt):
        list(broken)
    assert broken.step == 4
    write_state(tmp_path / "s.safetensors", snapshot(broken.state()))
    net, second = make()
    second.load_state(read_state(tmp_path / "s.safetensors"))
    list(second)
    assert_equal(outcome(net, second), expected)


def test_a_step_that_is_not_finite_changes_nothing():
    calls = [0]

    def fail(count):
        calls[0] += 1
        return float("nan") if calls[0] in (5, 6) else None  # both passes of step 3

    net, run = make(fail)
    seen = []
    for report in run:
        seen.append((report.skipped, [v.detach().clone() for v in net.state_dict().values()]))
    assert [skipped for skipped, _ in seen] == [i == 2 for i in range(12)]
    assert_equal(seen[1][1], seen[2][1])
    assert not torch.equal(seen[2][1][0], seen[3][1][0])
    assert run.optimizer.num_steps == 11


def test_a_loss_that_is_not_finite_changes_nothing_even_if_its_gradient_is():
    """The absolute value's gradient is 1 at infinity, so the scaler has nothing against it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    net, run = make(scaler=scaler, loss_function="l1", grad_accumulation_steps=1)
    predict = run.task.predict
    steps = iter(run)
    assert not next(steps).skipped
    before = [v.detach().clone() for v in net.state_dict().values()]
    run.task.predict = lambda *args: predict(*args) + float("inf")
    report = next(steps)
    assert report.skipped
    assert report.loss == float("inf")
    assert_equal(before, list(net.state_dict().values()))
    run.task.predict = predict
    assert not next(steps).skipped
    assert not torch.equal(before[0], net.state_dict()["0.weight"])


def test_bad_steps_in_a_row_end_the_run_with_advice():
    net, run = make(lambda count: float("inf"))
    before = [v.clone() for v in net.state_dict().values()]
    with pytest.raises(FloatingPointError, match="in 5 steps in a row.*Lower the learning rate"):
        list(run)
    assert run.step == MAX_BAD_STEPS
    state = snapshot(run.state())
    _, again = make(lambda count: float("inf"))
    again.load_state(state)
    with pytest.raises(FloatingPointError, match="up to step 10;"):
        list(again)
    assert_equal(before, list(net.state_dict().values()))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), RuntimeError(
        "MPS backend out of memory"), RuntimeError(
        "GET was unable to find an engine to execute this computation"), RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")],
)  # fmt: skip
@pytest.mark.parametrize(("fitting", "num_splits"), [(2, 1), (1, 2)])
def test_out_of_memory_splits_the_batch_with_the_same_result(error, fitting, num_splits):
    assert is_out_of_memory(error)
    net, run = make(batch_size=4)
    reports = list(run)
    expected = [v.detach().clone() for v in net.state_dict().values()]
    freed = []

    def fail(count):
        if count > fitting:
            raise error

    net, run = make(fail, free=lambda: freed.append(1), batch_size=4)
    again = list(run)
    assert len(freed) == num_splits
    for one, two in zip(reports, again, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-4)
    for a, b in zip(expected, net.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=2e-3)  # Adam magnifies the last bits of tiny gradients


@pytest.mark.parametrize(("batch_size", "tries"), [(1, 1), (2, 2), (5, 4)])
def test_out_of_memory_that_splitting_does_not_cure_is_raised(batch_size, tries):
    calls = [0]

    def fail(count):
        calls[0] += 1
        raise torch.OutOfMemoryError("CUDA out of memory")

    _, run = make(fail, batch_size=batch_size)
    before = snapshot(run.state())
    with pytest.raises(torch.OutOfMemoryError):
        list(run)
    assert calls[0] == tries
    assert run.state()["num_parts"] == before["num_parts"] == 1
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_an_error_within_an_update_is_not_saved_as_a_whole_step(monkeypatch):
    _, run = make()
    steps = iter(run)
    next(steps)
    before = run.optimizer.generator.get_state()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("sara_core.optimizer.low_rank.nuclear_norm_gradient", fail)
        with pytest.raises(torch.OutOfMemoryError):
            list(run)
    assert torch.equal(run.optimizer.generator.get_state(), before)
    assert run.state()["step"] == 1  # the weights were not touched yet

    _, run = make()
    steps = iter(run)
    next(steps)
    monkeypatch.setattr("sara_core.optimizer.updates.adamw", fail)
    with pytest.raises(torch.OutOfMemoryError):
        list(run)
    with pytest.raises(RuntimeError, match="in the middle of an update"):
        run.state()
