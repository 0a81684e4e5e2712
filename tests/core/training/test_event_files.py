"""Curves for TensorBoard, as TensorBoard's own reader finds them."""

import logging
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sara_core.training.event_files import refuse_missing
from sara_core.training.run_folder import RunFolder
from sara_core.training.run_settings import RunSettings
from sara_core.training.task import StepReport


def report(step, loss, prior=None):
    return StepReport(step, loss, 1e-4 * step, 1, False, prior)


def scalars(folder):
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, round(event.value, 6)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_what_is_written_is_what_loss_csv_holds_also_after_steps_were_retried(tmp_path):
    folder = RunFolder.create(tmp_path, "run", RunSettings(tensorboard=True))
    for step in (1, 2, 3):
        folder.add_loss(report(step, 1 / step, 0.5))
    folder.add_validation(3, 0.25)
    folder.close()
    again = RunFolder(folder.path)
    assert again.settings.tensorboard
    again.read_losses(2)
    again.read_validation(2)
    for step in (3, 4):
        again.add_loss(report(step, 2.0))
    again.close()
    found = scalars(folder)
    assert found["loss"] == [(1, 1.0), (2, 0.5), (3, 2.0), (4, 2.0)]
    assert found["learning_rate"] == [(1, 1e-4), (2, 2e-4), (3, 3e-4), (4, 4e-4)]
    assert found["regularisation_loss"] == [(1, 0.5), (2, 0.5)]
    assert found["validation_loss"] == []  # of step 3, which was made again


def test_without_the_option_there_are_none(tmp_path):
    folder = RunFolder.create(tmp_path, "run", RunSettings())
    folder.add_loss(report(1, 1.0))
    folder.close()
    assert not (folder.path / "tensorboard").exists()


def test_what_cannot_be_written_is_said_once_and_ends_nothing(tmp_path, caplog):
    folder = RunFolder.create(tmp_path, "run", RunSettings(tensorboard=True))
    (folder.path / "tensorboard").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            folder.add_loss(report(step, 1.0))
    folder.close()
    assert caplog.text.count("no more event files for TensorBoard") == 1
    assert len((folder.path / "loss.csv").read_text().splitlines()) == 4


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        refuse_missing()
