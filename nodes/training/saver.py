"""Saves a run, takes it up again, and puts out its delta."""

import logging
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...sara_core import SparseDelta
from ...sara_core.delta.export import export
from ...sara_core.files.atomic import replace_atomically
from ...sara_core.training.run_folder import RunFolder
from ...sara_core.training.run_settings import SAVE_DTYPES
from ...sara_core.training.trainer import TrainingRun
from .. import host, output_folder
from .ending import add_line, how_it_ended
from .examples import Examples, differences
from .folders import best_of, put_out
from .metadata import base_metadata, identity, present_metadata, run_metadata, with_end
from .previews import Previews
from .reporter import Reporter

logger = logging.getLogger("comfyui-sara")


class Saver:
    """Keeps what a run has learned in its folder.

    Args:
        patcher: The MODEL that is trained.
        examples: What it is trained on.
        training: The loop.
        previews: Makes the picture that a file carries.
        reporter: Shows what was saved.

    Attributes:
        losses: Of each step so far.
        validation: Step and loss on the pictures held out.
    """

    def __init__(
        self,
        patcher,
        examples: Examples,
        training: TrainingRun,
        previews: Previews,
        reporter: Reporter,
    ):
        self.folder: RunFolder = reporter.folder
        self.training, self.previews, self.reporter = training, previews, reporter
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self._identity = identity(
            patcher, examples, training.task.validation, self.folder.settings.offloading
        )
        self._patcher = patcher
        self._metadata = run_metadata(patcher, self.folder.settings, training.optimizer)
        self._dtype = SAVE_DTYPES[self.folder.settings.save_dtype]

    def resume(self) -> list[float]:
        """Take over the folder's state; returns the learning rates of the steps it has behind it.

        Raises:
            ValueError: The model or the pictures are others, or the state is damaged.
        """
        name = self.folder.path.name
        try:
            if (state := self.folder.read_state()) is None:
                return self._resume_from_delta()
            wrong = differences(state["identity"], self._identity)
            if wrong:
                raise ValueError(
                    f"{name} cannot be resumed with what is connected: {'; '.join(wrong)}. Connect "
                    "the model and pictures it was started with"
                )
            records = state["run"]["optimizer"]["sara"]["weights"]
            names = list(dict.fromkeys(record["name"] for record in records))
            base = base_metadata(self._patcher, names)
            self.training.load_state(state["run"])
            self._metadata |= base
            self.losses = state["losses"].tolist()
            self.validation = [tuple(entry) for entry in state["validation"]]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"the state of {name} is damaged: {error!r}") from error
        self.folder.forget_bests_after(self.training.step)
        rows = self.folder.read_losses(self.training.step)
        self.folder.read_validation(self.training.step)
        self.reporter.say(f"resumed after step {self.training.step}")
        return [rate for _, rate in rows]

    def _resume_from_delta(self) -> list[float]:
        """Go on from the delta of a finished run whose state is gone."""
        start = self.folder.settings.schedule_start
        path = output_folder.final_path(self.folder.path, start)
        if not path.is_file():
            raise ValueError(
                f"the run {self.folder.path.name} can neither be resumed nor has it finished: there is "
                "neither its state nor its final delta; choose another one under resume"
            )
        self.training.load_delta(SparseDelta.load(path))
        self.folder.forget_bests_after(start)
        rows = self.folder.read_losses(start)
        self.losses = [loss for loss, _ in rows]
        self.validation = self.folder.read_validation(start)
        self.reporter.warn(f"the state was not kept: going on from {path.name} with new moments")
        return [rate for _, rate in rows]

    def save(self, wait: bool = False) -> Exception | None:
        """Save a checkpoint and the state; a save that fails does not end the training.

        Args:
            wait: Return when it is written.

        Returns:
            What went wrong with the save before, or with this one if `wait` is set.
        """
        optimizer = self.training.optimizer
        try:
            problem = self.folder.save(
                {
                    "run": self.training.state(),
                    "identity": self._identity,
                    "losses": torch.tensor(self.losses, dtype=torch.float64),
                    "validation": self.validation,
                },
                self._metadata | present_metadata(optimizer, self.previews.thumbnail),
                keep=self.folder.settings.keep_checkpoints,
                dtype=self._dtype,
                wait=wait,
            )
        except Exception as error:
            problem = error
        if problem is None:
            self.reporter.chart.mark("saved", "saved")
        elif not wait:
            self.reporter.chart.mark("error", f"could not save: {problem}")
            self.reporter.say(f"could not save ({problem}); the training goes on, free some space")
        return problem

    def keep_best(self) -> None:
        """Keep apart what has the lowest loss on the pictures held out, if it is that of this step."""
        step, folder = self.training.step, self.folder
        kept = [entry for entry in self.validation if folder.best_path(entry[0]).is_file()]
        best = best_of([*kept, self.validation[-1]])
        if best is None or best[0] != step or not step:
            return
        present = present_metadata(self.training.optimizer, self.previews.thumbnail)
        measured = {"sara.validation_loss": repr(best[1])}
        try:
            delta = self.training.optimizer.delta(self._metadata | present | measured)
            folder.keep_best(delta, step, self._dtype)
            return
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        host.free_memory()  # outside the except block, where the error held on to tensors
        self.reporter.chart.mark("error", f"could not save: {problem}")
        self.reporter.say(f"could not keep the best checkpoint ({problem}); the training goes on")

    def save_at_the_end(self, error: BaseException) -> str:
        """Save what an error leaves, add to its message where that is, and return the line."""
        text = self.reporter.say(self._saved_after(how_it_ended(error)))
        add_line(error, text)
        return text

    def _saved_after(self, ending: str) -> str:
        step, name = self.training.step, output_folder.output_relative(self.folder.path)
        if step == 0:
            return f"{ending} before the first step; nothing was to be saved"
        problem = self.save(wait=True)
        if problem is None:
            return (
                f"{ending}; all {step} steps are saved in output/sara/{name}. To go on, choose "
                f"{name} under resume in SaRA Train"
            )
        there = (
            f"an earlier save is there; once it can be written to again, choose {name} under "
            "resume in SaRA Train"
            if self.folder.can_resume
            else "there is no earlier save"
        )
        return (
            f"{ending}; step {step} could not be saved whole in output/sara/{name}: {problem}; "
            f"{there}"
        )

    def finish(self) -> Path:
        """Save the final delta, and the state if it is to be kept.

        Returns:
            Path of the delta that is put out: the final one, or by choice the best.
        """
        settings, optimizer = self.folder.settings, self.training.optimizer
        path = output_folder.final_path(self.folder.path, settings.last_step)
        present, is_kept = present_metadata(optimizer, self.previews.thumbnail), True
        try:
            if settings.keep_state:
                is_kept = self._keep_state(settings.last_step)
            delta = optimizer.delta(with_end(self._metadata, settings.ended_at) | present)
            self.folder.finish(delta, path, self._dtype, settings.last_step, settings.keep_state)
        except BaseException as error:
            self.save_at_the_end(error)
            raise
        logger.info("SaRA Train: saved %s", path)
        if not is_kept:
            self.reporter.warn(
                "the state to go on from could not be saved, free some space; the delta is saved, and "
                "more_steps will go on from that, with new moments"
            )
        path = put_out(self.folder, path, self.validation)
        if settings.lora_file != "none":
            self._write_lora(path)
        return path

    def _keep_state(self, step: int) -> bool:
        """Save the state after the last step, unless that was done; returns whether it is there."""
        self.folder.finish_saving()
        if self.folder.saved_step != step:
            self.save(wait=True)
        return self.folder.saved_step == step

    def _write_lora(self, path: Path) -> None:
        """Write the delta that is put out once more for loaders of LoRAs; a failure is said and ends nothing."""
        target = output_folder.lora_path(path)
        try:
            tensors, kept = export(
                SparseDelta.load(path), self.folder.settings.lora_file, self._dtype
            )
            replace_atomically(target, lambda temporary: save_file(tensors, temporary))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            self.reporter.warn(
                f"wrote {target.name} for models/loras; it keeps {kept:.0%} of the change's energy"
            )
            return
        host.free_memory()  # outside the except block, where the error held on to tensors
        self.reporter.warn(f"could not write the LoRA file ({problem}); the delta is saved")
