"""How a run ends before its last step, what it puts out, and how often it goes over the pictures."""

import json
import threading

import pytest
import torch

from .builders import pairs, settings, train

MEASURED = [9.0, 5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 2.0]  # after steps 0, 1, 2, ...


@pytest.fixture
def measured(sara, monkeypatch):
    """Have the loss on the pictures held out be known."""
    monkeypatch.setattr(sara.run.TrainingRun, "validate", lambda training: MEASURED[training.step])


def held_out(sara, **changes):
    return settings(
        sara, steps=7, validation_split=0.3, validate_every_steps=1, batch_size=2, **changes
    )


def equal(one, two):
    assert one.entries.keys() == two.entries.keys()
    for name, entry in one.entries.items():
        assert torch.equal(entry.index, two.entries[name].index), name
        assert torch.equal(entry.values, two.entries[name].values), name


def run(sara, sd15, folder, options, resume=False):
    latents, captions = pairs(6)
    examples = sara.examples.Examples(latents, captions)
    folder = sara.folder.RunFolder(folder) if resume else sara.folder.RunFolder.create(folder, "run", options)  # fmt: skip
    if resume:
        folder.settings = options
    return sara.run.run(sd15, examples, folder, None, resume)


def after(sara, sd15, parent, steps, **changes):
    """What a run has learned after so many of its steps, as the checkpoint it would have left."""
    options = held_out(sara, save_every_steps=steps, keep_checkpoints=9, **changes)
    run(sara, sd15, parent, options)
    return sara.core.SparseDelta.load(
        parent / "run_00001" / f"checkpoint_{steps:07}_steps.safetensors"
    )


def test_patience_ends_it_and_the_best_is_kept_and_put_out(sd15, sara, tmp_path, measured):
    options = held_out(sara, patience=2, put_out="best validation")
    path, losses, chart = run(sara, sd15, tmp_path, options)
    folder = tmp_path / "run_00001"
    assert len(losses["loss"]) == 5
    assert losses["validation_step"] == [0, 1, 2, 3, 4, 5]
    assert path == folder / "best_0000003_steps.safetensors"
    assert [file.name for file in folder.glob("best_*")] == [path.name]
    assert (folder / "run_5_steps.safetensors").is_file()
    assert "ended after step 5 of 7: the loss on the pictures held out was lowest after step 3 (3.0000)" in "".join(chart["warnings"])  # fmt: skip
    best = sara.core.SparseDelta.load(path)
    assert best.metadata["sara.validation_loss"] == "3.0"
    assert best.metadata["sara.steps"] == "3"
    equal(best, after(sara, sd15, tmp_path / "whole", 3))
    again = sara.folder.RunFolder(folder)  # chosen once more, it puts out the same
    assert sara.folders.is_finished(again)
    assert sara.folders.finished(again)[0] == path


def test_an_early_end_leaves_what_the_same_steps_leave(sd15, sara, tmp_path, measured):
    path, _, _ = run(sara, sd15, tmp_path / "ended", held_out(sara, patience=2))
    assert path.name == "run_5_steps.safetensors"
    delta = sara.core.SparseDelta.load(path)
    equal(delta, after(sara, sd15, tmp_path / "whole", 5))
    told = json.loads(delta.metadata["sara.settings"])
    assert (told["steps"], told["ended_at"]) == (7, 5)


def test_more_steps_after_an_early_end(sd15, sara, tmp_path, measured):
    path, _, _ = run(sara, sd15, tmp_path, held_out(sara, patience=2))
    own = sara.folder.RunFolder(path.parent)
    more = own.settings.extended_by(2, own.settings)
    own.close()
    path, losses, _ = run(sara, sd15, path.parent, more, resume=True)
    assert path.name == "run_7_steps.safetensors"
    assert losses["validation_step"] == list(range(8))  # patience counts anew


def test_without_patience_the_best_is_kept_all_the_same(sd15, sara, tmp_path, measured):
    path, losses, _ = run(sara, sd15, tmp_path, held_out(sara))
    assert path.name == "run_7_steps.safetensors"
    assert (path.parent / "best_0000007_steps.safetensors").is_file()
    assert len(losses["loss"]) == 7


def test_a_best_that_was_deleted_is_not_put_out(sd15, sara, tmp_path, measured):
    options = held_out(sara, patience=2, put_out="best validation")
    path, _, _ = run(sara, sd15, tmp_path, options)
    path.unlink()
    folder = sara.folder.RunFolder(path.parent)
    assert sara.folders.finished(folder)[0].name == "run_5_steps.safetensors"


def test_a_best_that_cannot_be_written_does_not_end_the_run(
    sd15, sara, tmp_path, measured, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sara.folder.RunFolder, "keep_best", full)
    path, losses, chart = run(sara, sd15, tmp_path, held_out(sara))
    assert path.name == "run_7_steps.safetensors"
    assert "No space left on device" in str(chart["marks"])


def test_the_chart_tells_of_a_run_whose_last_save_fails(
    sd15, sara, tmp_path, measured, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    shown = []
    send = sara.run.Reporter.__init__

    def watched(reporter, *args):
        send(reporter, *args)
        monkeypatch.setattr(reporter.chart, "send", lambda: shown.append(reporter.chart.state()))

    monkeypatch.setattr(sara.run.Reporter, "__init__", watched)
    monkeypatch.setattr(sara.folder.RunFolder, "finish", full)
    with pytest.raises(OSError, match="No space left on device"):
        run(sara, sd15, tmp_path, held_out(sara))
    assert shown[0]["status"] == "training"
    assert shown[-1]["status"] == "stopped"
    step, kind, text = shown[-1]["marks"][-1]
    assert (step, kind) == (7, "error")
    assert "all 7 steps are saved in output/sara" in text


def test_only_bests_that_are_there_count(sd15, sara, tmp_path, measured, monkeypatch):
    keep, failing = sara.folder.RunFolder.keep_best, [3]

    def sometimes(folder, delta, step, dtype):
        if step in failing:
            raise MemoryError("no room")
        keep(folder, delta, step, dtype)

    monkeypatch.setattr(sara.folder.RunFolder, "keep_best", sometimes)
    options = held_out(sara, put_out="best validation", save_every_steps=0, progressive=0)
    path, _, chart = run(sara, sd15, tmp_path, options)
    assert "MemoryError: no room" in str(chart["marks"])
    assert path.name == "best_0000007_steps.safetensors"
    failing += [7]
    path, _, _ = run(sara, sd15, tmp_path / "again", options)
    assert path.name == "best_0000006_steps.safetensors"  # 3.1, as 4.0, 3.5 and 3.2 before it were


def test_a_kill_leaves_the_best_of_the_state_that_is_gone_on_from(
    sd15, sara, tmp_path, monkeypatch
):
    losses = [9.0, 5.0, 4.0, 3.9, 3.8, 3.7, 3.6, 9.0]
    monkeypatch.setattr(sara.run.TrainingRun, "validate", lambda training: losses[training.step])
    options = held_out(sara, put_out="best validation", save_every_steps=3, progressive=0)
    folder = sara.folder.RunFolder.create(tmp_path, "run", options)
    add_loss, kept = folder.add_loss, []

    def killed(report):
        add_loss(report)
        if report.step == 6:
            folder.finish_saving()
            kept.extend(sorted(file.name for file in folder.path.glob("best_*")))
            monkeypatch.setattr(folder, "save", lambda *_, **__: None)
            raise KeyboardInterrupt

    folder.add_loss = killed
    latents, captions = pairs(6)
    examples = sara.examples.Examples(latents, captions)
    with pytest.raises(KeyboardInterrupt):
        sara.run.run(sd15, examples, folder, None)
    assert kept == [f"best_000000{step}_steps.safetensors" for step in (3, 5)]
    losses[4:] = [9.0] * 4  # as if it went otherwise this time
    path, _, _ = run(sara, sd15, folder.path, options, resume=True)
    assert path.name == "best_0000003_steps.safetensors"
    assert [file.name for file in folder.path.glob("best_*")] == [path.name]


def test_a_run_named_best_keeps_its_deltas(sd15, sara, tmp_path, measured):
    latents, captions = pairs(6)
    examples = sara.examples.Examples(latents, captions)
    folder = sara.folder.RunFolder.create(tmp_path, "best", held_out(sara))
    path, _, _ = sara.run.run(sd15, examples, folder, None)
    assert path.name == "best_7_steps.safetensors"
    again = sara.folder.RunFolder(path.parent)
    more = again.settings.extended_by(1, again.settings)
    again.settings = more
    MEASURED.append(1.0)
    try:
        sara.run.run(sd15, examples, again, None, True)
    finally:
        MEASURED.pop()
    assert path.is_file()


def test_checkpoints_are_loaded_with_the_best_once(sd15, sara, tmp_path, measured, monkeypatch):
    from sara_pack.nodes.sampling.sampling_nodes import SaraLoadCheckpoints

    options = held_out(sara, patience=2, save_every_steps=1, keep_checkpoints=9)
    path, _, _ = run(sara, sd15, tmp_path / "sara", options)
    monkeypatch.setattr("folder_paths.get_output_directory", lambda: str(tmp_path))
    deltas, names = SaraLoadCheckpoints.execute("run_00001").args
    assert names == [
        "checkpoint_0000001_steps.safetensors", "checkpoint_0000002_steps.safetensors",
        "best_0000003_steps.safetensors", "checkpoint_0000004_steps.safetensors", path.name,
    ]  # fmt: skip
    assert [delta.metadata["sara.steps"] for delta in deltas] == list("12345")


def test_what_is_asked_of_a_run_is_done_after_the_step(sd15, sara, tmp_path):
    from sara_pack.nodes.training import wishes

    latents, captions = pairs(4)
    folder = sara.folder.RunFolder.create(
        tmp_path, "run", settings(sara, steps=6, save_every_steps=0, progressive=0)
    )
    add_loss, answers = folder.add_loss, []

    def click(wish, run="run_00001"):
        clicked = threading.Thread(
            target=lambda: answers.append(wishes.ask({"run": run, "wish": wish})["problem"])
        )
        clicked.start()
        clicked.join()

    def add(report):
        add_loss(report)
        if report.step == 2:
            click("save")
            click("save")
            click("dance")
            click("end", "run_00002")
        if report.step == 4:
            click("end")

    folder.add_loss = add
    delta, losses = train(sara, sd15, latents, captions, None, new=folder)
    assert answers[:2] == [None, None]
    assert "expected one of save, preview, end" in answers[2]
    assert answers[3:] == ["'run_00002' is not being trained", None]
    assert len(losses) == 4
    left = sorted(file.name for file in folder.path.glob("*.safetensors"))
    assert left == ["checkpoint_0000002_steps.safetensors", "run_4_steps.safetensors", "state.safetensors"]  # fmt: skip
    assert delta.metadata["sara.steps"] == "4"
    assert "ended after step 4 of 6: as asked" in (folder.path / "log.txt").read_text()
    assert "not being trained" in wishes.ask({"run": "run_00001", "wish": "save"})["problem"]


@pytest.mark.parametrize(
    ("processes", "changes", "steps"),
    [
        (1, {}, 3 * (3 + 1)),  # 5 of one size, 2 of another, in batches of 2
        (2, {}, 3 * (2 + 1)),  # batches of 4
        (1, {"grad_accumulation_steps": 5}, 3),  # 12 batches are 3 updates
        (1, {"validation_split": 0.3}, None),
        (1, {"epochs": 0}, 500),
    ],
)
def test_epochs_are_counted_in_steps(sara, processes, changes, steps):
    from sara_pack.nodes.training.epochs import with_steps

    latents, captions = pairs(5)
    tall, more = pairs(2, size=6, seed=1)
    examples = sara.examples.Examples(latents + tall, captions + more)
    values = {"epochs": 3, "batch_size": 2, **changes}
    found = with_steps(sara.settings.RunSettings(**values), examples, processes)
    if steps is None:
        kept, _ = sara.examples.split_validation(examples, 0.3, found.seed)
        large = sum(i < 5 for i in kept)
        steps = 3 * (-(-large // 2) + -(-(len(kept) - large) // 2))
    assert found.steps == steps


def test_endings_that_cannot_be_are_refused_when_queued(sara):
    from sara_pack.nodes.training.train import SaraTrain

    def refused(run="new run", **values):
        return SaraTrain.validate_inputs([run], **{name: [value] for name, value in values.items()})

    assert "validation_split is 0" in refused(patience=2)
    assert "validation_split is 0" in refused(put_out="best validation")
    assert "expected one of last step, best validation" in refused(put_out="best")
    assert refused(patience=2, validation_split=0.1, put_out="best validation") is True
    assert refused(patience=2, validation_split=None) is True  # linked


def test_an_average_is_what_is_measured_saved_and_put_out(sd15, sara, tmp_path):
    common = {
        "learning_rate": 1e-3, "lr_schedule": "constant", "save_every_steps": 3, "keep_checkpoints": 9,
        "progressive": 0,
    }  # fmt: skip
    plain, _, _ = run(sara, sd15, tmp_path / "plain", held_out(sara, **common))
    options = held_out(sara, ema_decay=0.5, **common)
    path, losses, _ = run(sara, sd15, tmp_path / "average", options)
    averaged, trained = sara.core.SparseDelta.load(path), sara.core.SparseDelta.load(plain)
    state = sara.folder.RunFolder(path.parent)
    records = state.read_state()["run"]["optimizer"]["sara"]["weights"]
    state.close()
    assert {record["name"] for record in records} == averaged.entries.keys()
    for record in records:
        expected = record["average"] - record["base"].float()
        assert torch.equal(averaged.entries[record["name"]].values, expected)
    first = next(iter(trained.entries))
    assert not torch.equal(averaged.entries[first].values, trained.entries[first].values)
    name = "checkpoint_0000003_steps.safetensors"
    one, two = (sara.core.SparseDelta.load(file.parent / name) for file in (plain, path))
    assert not torch.equal(one.entries[first].values, two.entries[first].values)
    applied = sara.host.apply_delta(sd15, averaged, 1.0)
    latents, captions = pairs(6)
    examples = sara.examples.Examples(latents, captions)
    with sara.run.prepared(applied, examples, options) as (_, training):
        assert training.validate() == pytest.approx(losses["validation_loss"][-1], rel=1e-4)


def test_what_has_learned_nothing_yet_is_no_best(sd15, sara, tmp_path, monkeypatch):
    """A run cancelled before its first step leaves no delta, nor a folder."""
    monkeypatch.setattr(sara.run.TrainingRun, "validate", lambda training: 1.0 + training.step)

    def cancelled(training):
        raise sara.host.Cancelled

    with monkeypatch.context() as patched:
        patched.setattr(sara.run.TrainingRun, "_make_step", cancelled)
        with pytest.raises(sara.host.Cancelled):
            run(sara, sd15, tmp_path / "runs", held_out(sara))
    assert not list((tmp_path / "runs").iterdir())
    path, _, _ = run(sara, sd15, tmp_path / "runs", held_out(sara, put_out="best validation"))
    assert path.name == "best_0000001_steps.safetensors"  # of those that have learned something


@pytest.mark.parametrize("fails", [1, 2])
def test_a_last_state_that_finds_no_room_is_tried_again_and_then_told(
    sd15, sara, tmp_path, monkeypatch, fails
):
    write, left = sara.folder.write_state, [fails]

    def full(path, state):
        if state["run"]["step"] == 4 and left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        write(path, state)

    monkeypatch.setattr(sara.folder, "write_state", full)
    options = settings(sara, steps=4, save_every_steps=2)
    path, _, chart = run(sara, sd15, tmp_path, options)
    assert path.name == "run_4_steps.safetensors"
    is_told = "the state to go on from could not be saved" in "".join(chart["warnings"])
    assert is_told == (fails == 2)
    assert (path.parent / "state.safetensors").is_file() == (fails == 1)
    more = options.extended_by(2, options)
    path, losses, chart = run(sara, sd15, tmp_path / "run_00001", more, resume=True)
    assert (path.name, len(losses["loss"])) == ("run_6_steps.safetensors", 6)
    assert ("with new moments" in "".join(chart["warnings"])) == (fails == 2)
