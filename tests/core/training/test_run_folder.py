"""The folder a run keeps: its checkpoints, losses and state."""

import csv
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch

from sara_core import SparseDelta
from sara_core.training import run_folder
from sara_core.training.run_folder import RunFolder
from sara_core.training.run_settings import RunSettings
from sara_core.training.task import StepReport

from .small_run import SETTINGS, make


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


def test_a_full_disk_is_reported_and_the_last_good_save_stays(tmp_path, monkeypatch):
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


def test_a_state_of_before_the_end_is_not_kept_beside_the_delta(tmp_path):
    _, run = make()
    folder = RunFolder.create(tmp_path, "style", RunSettings(**SETTINGS))
    for report in run:
        if report.step == 2:
            assert folder.save(saved(run), {}, keep=2, wait=True) is None
    folder.finish(run.optimizer.delta(), folder.path / "end.safetensors", torch.float32, 12, True)
    assert not folder.can_resume
    assert folder.save(saved(run), {}, keep=2, wait=True) is None
    folder.finish(run.optimizer.delta(), folder.path / "end.safetensors", torch.float32, 12, True)
    assert folder.can_resume


def test_files_that_another_program_has_open_do_not_fail_what_is_done(tmp_path, monkeypatch):
    _, run = make()
    folder = RunFolder.create(tmp_path, "style", RunSettings(**SETTINGS))
    list(run)
    assert folder.save(saved(run), {}, keep=2, wait=True) is None
    folder.preview_path(3).parent.mkdir()
    folder.preview_path(3).touch()
    folder.keep_best(run.optimizer.delta(), 9, torch.float32)

    def refused(path, missing_ok=False):
        raise PermissionError(13, "open in another program")

    with monkeypatch.context() as patched:
        patched.setattr(type(folder.path), "unlink", refused)
        folder.finish(run.optimizer.delta(), folder.path / "end.safetensors", torch.float32, 12)
        folder.forget_bests_after(4)
        assert folder.previews(2) == []
    assert (folder.path / "end.safetensors").is_file()


def test_a_resumed_run_keeps_its_new_checkpoints_and_skips_those_of_later_steps(tmp_path):
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


def test_left_over_temporary_files_are_cleared(tmp_path):
    folder = RunFolder.create(tmp_path, "style", RunSettings())
    folder.add_loss(StepReport(1, 0.5, 1e-3, 1))
    folder.close()
    (folder.path / ".state.safetensors.abc.tmp").write_text("half a save")
    RunFolder(folder.path).close()
    assert not list(folder.path.glob(".*"))


@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_a_folder_that_vanishes_is_made_again_with_all_that_is_learned(tmp_path, how):
    _, run = make()
    folder = RunFolder.create(tmp_path, "style", RunSettings(**SETTINGS))
    for report in run:
        folder.add_loss(report)
        if report.step == 4:
            assert folder.save(saved(run), {}, keep=2, wait=True) is None
            if how == "deleted":
                shutil.rmtree(folder.path)
            else:
                folder.path.rename(tmp_path / "other")
        if report.step == 8:
            assert folder.save(saved(run), {}, keep=2, wait=True) is None
    assert folder.read_state()["run"]["step"] == 8
    path = folder.path / "style_12_steps.safetensors"
    folder.finish(run.optimizer.delta(), path, torch.float32, 12)
    folder.close()
    assert SparseDelta.load(path).num_values == run.optimizer.delta().num_values
    assert RunFolder(folder.path).settings == RunSettings(**SETTINGS)
    assert "has been made again" in (folder.path / "log.txt").read_text()


def test_the_best_of_a_save_under_way_is_not_deleted(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path, "style", RunSettings(**SETTINGS))
    _, run = make()
    steps, may_write = iter(run), threading.Event()

    def best_at(step):
        while run.step < step:
            next(steps)
        folder.keep_best(run.optimizer.delta(), step, torch.float16)

    best_at(2)
    folder.save({"run": run.state()}, {}, keep=2, wait=True)
    best_at(4)
    write = run_folder.write_state
    monkeypatch.setattr(run_folder, "write_state", lambda *a: (may_write.wait(60), write(*a)))
    next(steps)
    folder.save({"run": run.state()}, {}, keep=2)
    best_at(6)
    kept = sorted(path.name for path in folder.path.glob("best_*"))
    assert kept == [f"best_000000{step}_steps.safetensors" for step in (2, 4, 6)]
    may_write.set()
    assert folder.finish_saving() is None
    assert (folder.saved_step, folder.read_state()["run"]["step"]) == (5, 5)
    folder.forget_bests_after(5)
    assert folder.best_path(4).is_file()
    folder.close()


def test_a_run_may_be_called_like_its_checkpoints(tmp_path):
    folder = RunFolder.create(tmp_path, "checkpoint", RunSettings(**SETTINGS))
    _, run = make()
    next(iter(run))
    path = folder.path / "checkpoint_1000000_steps.safetensors"
    folder.finish(run.optimizer.delta(), path, torch.float16, 1_000_000)
    assert SparseDelta.load(path).num_values
    folder.close()
