"""Runs that stop and go on, leave out bad steps, split batches, and the files they keep."""

import csv
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch
from torch import nn

from sara_core import SaraAdamW, SparseDelta
from sara_core.files.state_file import read_state, snapshot, write_state
from sara_core.training.config import TrainConfig
from sara_core.training.objective import NoiseSchedule
from sara_core.training.out_of_memory import is_out_of_memory
from sara_core.training.run_folder import RunFolder
from sara_core.training.run_settings import RunSettings
from sara_core.training.task import StepReport
from sara_core.training.trainer import MAX_BAD_STEPS, TrainingRun


class Task:
    """Seven latents of two sizes and a two-layer 'model'; `fail` runs before each prediction."""

    def __init__(self, net, fail=lambda count: None):
        self.net, self.fail = net, fail
        self.schedule = NoiseSchedule("flow", "logit_normal", lambda t: t)
        generator = torch.Generator().manual_seed(5)
        self.pictures = [torch.randn(1, 8 if i < 5 else 4, generator=generator) for i in range(7)]
        self.keys = [p.shape for p in self.pictures]
        self.training, self.regularisation, self.validation = range(7), (), ()

    def mask(self, pictures):
        return None

    def latents(self, pictures):
        return torch.cat([self.pictures[i] for i in pictures])

    def predict(self, noisy, sigma, pictures, dropped):
        scale = self.fail(len(pictures))
        padded = nn.functional.pad(noisy, (0, 8 - noisy.shape[1]))
        caption = torch.tensor(pictures) * ~torch.tensor(dropped)
        out = self.net(torch.cat([padded, caption[:, None] / 7], dim=1))[:, : noisy.shape[1]]
        return out if scale is None else out * scale


SETTINGS = {
    "steps": 12, "batch_size": 3, "grad_accumulation_steps": 2, "caption_dropout": 0.3, "warmup_steps": 3,
    "seed": 11,
}  # fmt: skip


def make(
    fail=lambda count: None, fraction=0.5, free=lambda: None, tweak=None, scaler=None, **settings
):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 8))
    if tweak is not None:
        tweak(net)
    optimizer = SaraAdamW(
        net, fraction=fraction, lr=1e-2, low_rank_weight=1e-2, progressive_step=6, seed=3
    )
    config = TrainConfig(**{**SETTINGS, **settings})
    return net, TrainingRun(optimizer, Task(net, fail), config, scaler, free_memory=free)


def outcome(net, run):
    tensors = [*net.state_dict().values()]
    for state in run.optimizer.state.values():
        tensors += [state["exp_avg"], state["exp_avg_sq"], state["step"]]
    return tensors


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


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
        "MPS backend out of memory")],
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


def test_states_keep_every_kind_of_value(tmp_path):
    state = {
        "numbers": [1, 2.5, 1e-300, True, None, "text"], 3: {0: torch.arange(3)},
        "half": torch.ones(2, dtype=torch.bfloat16), "empty": torch.zeros(0), "scalar": torch.tensor(7.0),
    }  # fmt: skip
    write_state(tmp_path / "s.safetensors", state)
    found = read_state(tmp_path / "s.safetensors")
    assert found["numbers"] == state["numbers"]
    assert found[3][0].tolist() == [0, 1, 2]
    assert torch.equal(found["half"], state["half"])
    assert (found["empty"].shape, found["scalar"].item()) == ((0,), 7.0)


def test_damaged_states_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    write_state(path, {"a": torch.arange(100), "b": 5})
    whole = path.read_bytes()
    for position in (9, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="cannot be used to resume"):
            read_state(path)
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="cannot be used to resume"):
        read_state(path)
    with pytest.raises(FileNotFoundError, match="no such state"):
        read_state(tmp_path / "none")


def test_folders_count_up_and_never_share(tmp_path):
    paths = []
    for _ in range(3):
        folder = RunFolder.create(tmp_path / "sara", "style", RunSettings(steps=3))
        folder.add_loss(StepReport(1, 0.5, 1e-3, 1))
        folder.close()
        paths.append(folder.path)
    assert [p.name for p in paths] == ["style_00001", "style_00002", "style_00003"]
    assert RunFolder(paths[1]).settings == RunSettings(steps=3)


def test_many_makers_at_once_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        made = list(
            pool.map(lambda i: RunFolder.create(tmp_path, "style", RunSettings(seed=i)), range(32))
        )
    assert sorted(f.path.name for f in made) == [f"style_{n:05}" for n in range(1, 33)]
    assert all(f.settings == RunSettings(seed=i) for i, f in enumerate(made))


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    folder = RunFolder.create(tmp_path, "style", RunSettings())
    with pytest.raises(RuntimeError, match="style_00001 is being trained already"):
        RunFolder(folder.path)
    folder.add_loss(StepReport(1, 0.5, 1e-3, 1))
    folder.close()
    RunFolder(folder.path).close()
    assert sorted(os.listdir(folder.path)) == ["lock", "loss.csv", "settings.json"]


def test_a_run_without_a_step_leaves_no_folder(tmp_path):
    folder = RunFolder.create(tmp_path, "style", RunSettings())
    folder.log("nothing came of it")
    folder.close()
    assert not folder.path.exists()
    assert tmp_path.exists()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        RunFolder.create(tmp_path / "file", "style", RunSettings())


def saved(run, **more):
    return {"run": run.state(), **more}


def test_checkpoints_are_kept_and_the_final_delta_ends_the_state(tmp_path):
    _, run = make()
    folder = RunFolder.create(tmp_path, "style", RunSettings(**SETTINGS))
    for report in run:
        folder.add_loss(report)
        if report.step % 2 == 0:
            assert folder.save(saved(run), {"note": "x"}, keep=2) is None
    assert folder.finish_saving() is None
    names = sorted(p.name for p in folder.path.glob("checkpoint*"))
    assert names == ["checkpoint_0000010_steps.safetensors", "checkpoint_0000012_steps.safetensors"]
    last = SparseDelta.load(folder.path / names[-1])
    for name, entry in run.optimizer.delta().entries.items():
        assert torch.equal(last.entries[name].values, entry.values.half())
        assert torch.equal(last.entries[name].index, entry.index)
    assert folder.can_resume
    assert folder.read_state()["run"]["step"] == 12
    path = folder.path / "style_12_steps.safetensors"
    folder.finish(run.optimizer.delta(), path, torch.float32, 12)
    folder.close()
    assert path.is_file()
    assert [p.name for p in folder.path.glob("checkpoint*")] == names[:1]
    assert not folder.can_resume
    assert not list(folder.path.glob(".*"))
    assert "saved step 12" in (folder.path / "log.txt").read_text()


def test_loss_history_is_there_at_once_and_cut_on_resume(tmp_path):
    _, run = make()
    folder = RunFolder.create(tmp_path, "style", RunSettings(**SETTINGS))
    reports = []
    for report in islice(run, 6):
        reports.append(report)
        folder.add_loss(report)
        with open(folder.path / "loss.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert float(rows[-1]["loss"]) == report.loss
    with open(folder.path / "loss.csv", "a") as file:
        file.write("7,0.1")  # cut off by a crash
    assert folder.read_losses(4) == [(r.loss, r.learning_rate) for r in reports[:4]]
    folder.close()
    assert RunFolder(folder.path).read_losses(99) == [
        (r.loss, r.learning_rate) for r in reports[:4]
    ]


def test_a_full_disk_is_told_and_the_last_good_save_stays(tmp_path, monkeypatch):
    _, run = make()
    folder = RunFolder.create(tmp_path, "style", RunSettings(**SETTINGS))
    steps = iter(run)
    next(steps)
    assert folder.save(saved(run), {}, keep=2, wait=True) is None

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("sara_core.files.state_file.save_file", full)
        next(steps)
        assert folder.save(saved(run), {}, keep=2) is None  # in the background
        next(steps)
        problem = folder.save(saved(run), {}, keep=2, wait=True)
    assert "the state to resume from: [Errno 28] No space left" in str(problem)
    assert folder.read_state()["run"]["step"] == 1
    assert SparseDelta.load(folder.path / "checkpoint_0000003_steps.safetensors").num_values
    assert folder.save(saved(run), {}, keep=2, wait=True) is None
    assert folder.read_state()["run"]["step"] == 3
    assert not [name for name in os.listdir(folder.path) if name.startswith(".")]


def test_a_resumed_run_keeps_its_new_checkpoints_and_passes_by_those_of_later_steps(tmp_path):
    _, run = make()
    folder = RunFolder.create(tmp_path, "style", RunSettings(**SETTINGS))
    later = folder.path / "checkpoint_0000009_steps.safetensors"
    later.write_bytes(b"of before the resume, when the state did not fit on the disk")
    kept = []
    for report in run:
        if report.step % 2 == 0:
            assert folder.save(saved(run), {}, keep=2, wait=True) is None
            kept.append(sorted(int(p.name[11:18]) for p in folder.path.glob("checkpoint*")))
    assert kept == [[2, 9], [2, 4, 9], [4, 6, 9], [6, 8, 9], [9, 10], [10, 12]]


def test_a_loss_table_that_cannot_be_cut_does_not_stop_a_resume(tmp_path, monkeypatch):
    _, run = make()
    folder = RunFolder.create(tmp_path, "style", RunSettings(**SETTINGS))
    reports = list(islice(run, 4))
    for report in reports:
        folder.add_loss(report)

    def refused(*_):
        raise PermissionError(13, "open in another program")

    with monkeypatch.context() as patched:
        patched.setattr("sara_core.files.atomic.os.replace", refused)
        assert folder.read_losses(2) == [(r.loss, r.learning_rate) for r in reports[:2]]
    assert "loss.csv keeps rows after step 2" in (folder.path / "log.txt").read_text()
    assert folder.read_losses(4) == [(r.loss, r.learning_rate) for r in reports]


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


def test_left_over_temporary_files_are_cleared(tmp_path):
    folder = RunFolder.create(tmp_path, "style", RunSettings())
    folder.add_loss(StepReport(1, 0.5, 1e-3, 1))
    folder.close()
    (folder.path / ".state.safetensors.abc.tmp").write_text("half a save")
    RunFolder(folder.path).close()
    assert not list(folder.path.glob(".*"))
