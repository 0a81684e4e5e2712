"""The folder of one run: settings, loss history, checkpoints, and the state to go on from."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ..delta.sparse_delta import SparseDelta
from ..files.atomic import replace_atomically
from ..files.lock import hold
from ..files.state_file import read_state, snapshot, write_state
from ..optimizer.sparse_model import entries_of
from .event_files import EventFiles
from .run_settings import RunSettings
from .tables import StepTable
from .task import StepReport

STATE, SETTINGS, LOSSES, LOG = "state.safetensors", "settings.json", "loss.csv", "log.txt"
LOCK, JOB = "lock", "job.txt"
CHECKPOINT, CHECKPOINTS = "checkpoint_{:07}_steps.safetensors", "checkpoint_*_steps.safetensors"
BEST, BESTS = "best_{:07}_steps.safetensors", f"best_{'[0-9]' * 7}_steps.safetensors"
VALIDATION = "validation.csv"
EVENTS = "tensorboard"
PREVIEWS, PREVIEW = "previews", "preview_{:07}_steps.png"
COLUMNS = ("step", "loss", "learning_rate", "stage", "skipped", "regularisation_loss")
VALIDATION_COLUMNS = ("step", "loss")


class RunFolder:
    """Files of one run. Saves go on in a thread beside the training.

    No other process can open the folder until `close`, or until this process ends.

    Args:
        path: The folder, as `create` has made it.

    Raises:
        RuntimeError: Another process is training in it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self._lock = hold(self.path / LOCK)
        except BlockingIOError as error:
            raise RuntimeError(
                f"the run {self.path.name} is being trained already, by this ComfyUI or another one "
                "with the same output folder; wait for it or cancel it there"
            ) from error
        for left_over in self.path.glob(".*.tmp"):  # of a save that was killed
            _forget(left_over)
        saved = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
        self.settings = RunSettings.read(saved)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sara-save")
        self._pending: Future | None = None
        self._saved_step = self._saving_step = 0
        self._losses = StepTable(self.path / LOSSES, COLUMNS)
        self._validation = StepTable(self.path / VALIDATION, VALIDATION_COLUMNS)
        self._events = EventFiles(self.path / EVENTS)

    @classmethod
    def create(cls, parent: str | os.PathLike, name: str, settings: RunSettings) -> "RunFolder":
        """Make a new folder `<name>_<number>`; never one that exists, whoever else makes one.

        Args:
            parent: Folder to make it in; made if it does not exist.
            name: File name without separators.
            settings: Kept as JSON by name.

        Raises:
            OSError: The folder cannot be written to.
        """
        parent = Path(parent)
        parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = parent / f"{name}_{number:05}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
            number += 1
        _write_settings(path, settings)
        return cls(path)

    def save_settings(self) -> None:
        """Replace the settings in the file by those the run has now."""
        _write_settings(self.path, self.settings)

    def sign(self, job: str) -> None:
        """Note which job this is a run of, to be found when the job is started again."""
        with contextlib.suppress(OSError):
            (self.path / JOB).write_text(job, encoding="utf-8")

    @property
    def saved_step(self) -> int:
        """Step of the state that was saved last, by this object; 0 before any was."""
        return self._saved_step

    @property
    def can_resume(self) -> bool:
        """Whether there is a state to go on from."""
        return (self.path / STATE).is_file()

    def log(self, text: str) -> None:
        """Append a line with the time to the run's log; a full disk does not stop a run."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), open(self.path / LOG, "a", encoding="utf-8") as file:
            file.write(f"{stamp} {text}\n")

    def read_losses(self, up_to_step: int) -> list[tuple[float, float]]:
        """Return loss and learning rate up to a step; later ones, of steps that will be retried, are dropped."""
        return [(float(row[1]), float(row[2])) for row in self._cut(self._losses, up_to_step)]

    def read_validation(self, up_to_step: int) -> list[tuple[int, float]]:
        """Return step and validation loss up to a step and forget later ones."""
        rows = self._cut(self._validation, up_to_step)
        return [(int(step), float(loss)) for step, loss in rows]

    def _cut(self, table: StepTable, up_to_step: int) -> list[list[str]]:
        rows, problem = table.cut(up_to_step)
        if problem is not None:
            self.log(f"{table.path.name} keeps rows after step {up_to_step}: {problem}")
        return rows

    def add_loss(self, report: StepReport) -> None:
        """Append a step to loss.csv, at once; a full disk does not stop a run."""
        prior = report.regularisation_loss
        self._losses.add(
            (
                report.step, repr(report.loss), repr(report.learning_rate), report.stage,
                int(report.skipped), "" if prior is None else repr(prior),
            )
        )  # fmt: skip
        if self.settings.tensorboard:
            self._events.add(
                report.step, loss=report.loss, learning_rate=report.learning_rate,
                regularisation_loss=prior,
            )  # fmt: skip

    def add_validation(self, step: int, loss: float) -> None:
        """Append a validation loss after a step, or before the first one with 0, as `add_loss`."""
        self._validation.add((step, repr(loss)))
        if self.settings.tensorboard:
            self._events.add(step, validation_loss=loss)

    def save(
        self,
        state: dict,
        metadata: Mapping[str, str],
        *,
        keep: int,
        dtype: torch.dtype = torch.float16,
        wait: bool = False,
    ) -> Exception | None:
        """Save a checkpoint of the delta and the state to go on from.

        The tensors are copied at once; writing goes on in a thread unless `wait` is set. Each file
        replaces the one before only when it is whole.

        Args:
            state: From `TrainingRun.state`, with whatever else is needed to resume.
            metadata: Of the delta.
            keep: Number of checkpoints to keep.
            dtype: Of the checkpoint's values.
            wait: Return when it is written.

        Returns:
            What went wrong with the save before this one, or with this one if `wait` is set; None
            if nothing did.
        """
        problem = self.finish_saving()
        self._saving_step = state["run"]["step"]
        self._pending = self._writer.submit(
            self._write, snapshot(state), dict(metadata), keep, dtype
        )
        return self.finish_saving() if wait else problem

    def finish_saving(self) -> Exception | None:
        """Wait for the save under way; returns what went wrong with it, if anything did."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            pending.result()
        except Exception as error:  # whatever it is, the training is not to end for it
            self.log(f"could not save: {error}")
            return error
        return None

    def _write(self, state: dict, metadata: dict, keep: int, dtype: torch.dtype) -> None:
        step = state["run"]["step"]
        problems = []
        self._make_again()
        try:
            write_state(self.path / STATE, state)
            self._saved_step = step
        except OSError as error:
            problems.append(f"the state to resume from: {error}")
        try:  # much smaller, so it may fit where the state does not
            delta = SparseDelta(entries_of(state["run"]["optimizer"]["sara"]["weights"]), metadata)
            delta.save(self.path / CHECKPOINT.format(step), dtype)
            self._forget_checkpoints(step, keep)
        except (OSError, ValueError) as error:
            problems.append(f"the checkpoint: {error}")
        if problems:
            raise OSError("; ".join(problems))
        self.log(f"saved step {step}")

    def _make_again(self) -> None:
        """Make the folder again if it is gone while the run goes on."""
        if (self.path / SETTINGS).is_file():
            return
        with contextlib.suppress(OSError):  # then saving fails, and says so
            self.path.mkdir(parents=True, exist_ok=True)
            self.save_settings()
            self._lock.close()
            self._lock = hold(self.path / LOCK)
            for table in (self._losses, self._validation):
                table.forget()
            self._events.close()
            self._events = EventFiles(self.path / EVENTS)
            self.log("the folder was gone and has been made again; losses before are not in it")

    def _forget_checkpoints(self, step: int, keep: int) -> None:
        """Delete all but the last ones up to a step; later ones are of before a resume."""
        names = [path.name for path in self.path.glob(CHECKPOINTS)]
        up_to_now = sorted(name for name in names if name <= CHECKPOINT.format(step))
        for name in up_to_now[: -max(1, keep)]:
            _forget(self.path / name)

    def keep_best(self, delta: SparseDelta, step: int, dtype: torch.dtype) -> None:
        """Keep the delta after a step apart from the checkpoints, in place of the one before.

        That of the state that was saved last stays as well, as the run may have to go on from there.

        Raises:
            OSError: It cannot be written; the one before is still there then.
        """
        self._make_again()
        delta.save(self.best_path(step), dtype)
        self._forget_bests(step)

    def forget_bests_after(self, step: int) -> None:
        """Delete what was kept as best after a step from which the run goes on, as it will be again."""
        self._saved_step = self._saving_step = step
        for path in self.path.glob(BESTS):
            if path.name > BEST.format(step):
                _forget(path)

    def _forget_bests(self, newest: int) -> None:
        """Delete all but the newest and the last ones up to the states that were saved and are being saved."""
        names = sorted(path.name for path in self.path.glob(BESTS))
        needed = {BEST.format(newest)}
        for step in (self._saved_step, self._saving_step):
            needed |= set([name for name in names if name <= BEST.format(step)][-1:])
        for name in set(names) - needed:
            _forget(self.path / name)

    def best_path(self, step: int) -> Path:
        """Return where `keep_best` keeps the delta after a step."""
        return self.path / BEST.format(step)

    def read_state(self) -> dict | None:
        """Read the state to go on from, see `state_file.read_state`.

        None if there is none, or only one from before the run was given more steps, which its delta is newer than.
        """
        if not self.can_resume:
            return None
        state = read_state(self.path / STATE)
        return None if state["run"]["step"] < self.settings.schedule_start else state

    def preview_path(self, step: int) -> Path:
        """Return where the picture made after a step is kept; its folder may not exist yet."""
        return self.path / PREVIEWS / PREVIEW.format(step)

    def previews(self, up_to_step: int) -> list[tuple[int, str]]:
        """Return step and file name of the pictures up to a step, and delete those of later ones.

        Later ones are left of steps that will be retried.
        """
        found = []
        for path in sorted((self.path / PREVIEWS).glob("preview_*_steps.png")):
            step = path.name.split("_")[1]
            if step.isdecimal() and int(step) <= up_to_step:
                found.append((int(step), path.name))
            elif step.isdecimal():
                _forget(path)
        return found

    def finish(
        self,
        delta: SparseDelta,
        path: str | os.PathLike,
        dtype: torch.dtype,
        step: int,
        keep_state: bool = False,
    ) -> None:
        """Save the final delta, after the last step, at a path in this folder.

        A checkpoint of the same step is no longer needed then, and deleted; so is the state, unless
        it is to be kept and is of this step.
        """
        problem = self.finish_saving()
        if problem is not None:
            self.log(f"an earlier save had failed: {problem}")
        self._make_again()
        delta.save(path, dtype)
        if not keep_state or self._saved_step != step:
            _forget(self.path / STATE)
        if (checkpoint := self.path / CHECKPOINT.format(step)) != Path(path):
            _forget(checkpoint)
        self._saved_step = self._saving_step = step
        if newest := max(self.path.glob(BESTS), default=None):
            self._forget_bests(int(newest.name.split("_")[1]))
        self.log(f"finished, saved {Path(path).name}")

    def close(self) -> None:
        """Wait for the save under way and let go of the files; a run without a step leaves none."""
        self.finish_saving()
        self._writer.shutdown()
        for table in (self._losses, self._validation, self._events):
            table.close()
        self._lock.close()
        with contextlib.suppress(OSError):
            left = {path.name for path in self.path.iterdir()}
            if left <= {SETTINGS, LOG, LOCK, JOB, VALIDATION, PREVIEWS, EVENTS}:
                shutil.rmtree(self.path)


def _forget(path: Path) -> None:
    """Delete a file that is no longer needed, unless another program has it open."""
    with contextlib.suppress(OSError):
        path.unlink()


def _write_settings(path: Path, settings: RunSettings) -> None:
    text = json.dumps(settings.saved(), indent=1, sort_keys=True)
    replace_atomically(path / SETTINGS, lambda file: Path(file).write_text(text, "utf-8"))
