"""The folder of a run: a new one, that of an earlier run, and what a run that has ended left in it."""

import contextlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from ...sara_core.optimizer import packages
from ...sara_core.training import event_files
from ...sara_core.training.run_folder import RunFolder
from ...sara_core.training.run_settings import PUT_OUT, RunSettings
from .. import host, output_folder
from .widgets import NEW_RUN

LAST_STEP = PUT_OUT[0]

logger = logging.getLogger("comfyui-sara")


def open_folder(
    patcher, resume: str, settings: RunSettings, more_steps: int, begun: str | None
) -> tuple[RunFolder, bool]:
    """Make a new run's folder, or open that of the run to resume.

    A job that a scheduler or torchrun has started again goes on with the run it has begun.

    Args:
        patcher: The MODEL.
        resume: `NEW_RUN`, or the name of a run.
        settings: Of the node.
        more_steps: To make beyond those of a run that has finished.
        begun: Run that the job has begun already, if it was started again.

    Returns:
        The folder, and whether the run is a new one.
    """
    if begun is not None:
        resume, more_steps = begun, 0
    is_new = resume == NEW_RUN
    folder = (
        new_folder(patcher, settings)
        if is_new
        else old_folder(patcher, resume, settings, more_steps)
    )
    return folder, is_new


def new_folder(patcher, settings: RunSettings) -> RunFolder:
    """Make the folder of a new run on a MODEL.

    Raises:
        ValueError: Its name leads out of the output folder, the MODEL's prediction is another, or
            settings contradict each other.
        ImportError: A package that they need is missing.
        OSError: It cannot be written to.
    """
    settings.refuse_contradictions()
    _refuse_missing(settings)
    _refuse_other_prediction(patcher, settings)
    parent, name = output_folder.split_output_name(settings.output_name)
    return RunFolder.create(parent, name, settings)


def old_folder(patcher, name: str, settings: RunSettings, more_steps: int) -> RunFolder:
    """Open the folder of a run, with what may be changed, and more steps if it has finished.

    The file of its settings stays as it is until the run goes on.

    Args:
        patcher: The MODEL to go on with.
        name: As `output_folder.resumable_runs` lists it.
        settings: Of the node that resumes it.
        more_steps: To make beyond those it has finished.

    Raises:
        ValueError: No such run, or a MODEL of another prediction than its checkpoint's where the run
            does not allow it.
        RuntimeError: It is being trained.
    """
    folder = RunFolder(output_folder.run_path(name))
    try:
        own = folder.settings.resumed_with(settings)
        if more_steps or not is_finished(folder):
            _refuse_missing(own)
        _refuse_other_prediction(patcher, own)
        if more_steps and is_finished(folder):
            own = own.extended_by(more_steps, settings)
        folder.settings = own
    except BaseException:
        folder.close()
        raise
    return folder


def _refuse_missing(settings: RunSettings) -> None:
    """Refuse settings that need a package which is missing, before there is anything to lose.

    Raises:
        ImportError: Naming the first.
    """
    packages.refuse_unusable(settings.optimizer)
    if settings.tensorboard:
        event_files.refuse_missing()


def _refuse_other_prediction(patcher, settings: RunSettings) -> None:
    """Refuse a MODEL set to predict something else than its checkpoint does, unless that is meant.

    Raises:
        ValueError: It is, and `allow_other_prediction` is off.
    """
    foreign = host.foreign_prediction(patcher)
    if foreign is not None and not settings.allow_other_prediction:
        found, own = foreign
        raise ValueError(
            f"the model is set to {found} prediction, by a node before it such as ModelSamplingSD3 or "
            f"ModelSamplingDiscrete, but its checkpoint is one for {own} prediction; training it so "
            "would ruin it. Bypass that node, or turn allow_other_prediction on in SaRA Train if it "
            "is meant"
        )


def is_finished(folder: RunFolder) -> bool:
    """Tell whether a run has made all its steps, and its delta is there."""
    return output_folder.final_path(folder.path, folder.settings.last_step).is_file()


def finished(folder: RunFolder) -> tuple[Path, dict[str, list]]:
    """Return what `run` returned when a run ended: its final delta's file, and the losses.

    Raises:
        ValueError: The run has not ended, or its delta was deleted.
    """
    with contextlib.closing(folder):
        steps = folder.settings.last_step
        path = output_folder.final_path(folder.path, steps)
        if not path.is_file():
            raise ValueError(
                f"the run {folder.path.name} can neither be resumed nor has it finished: there is "
                f"neither its state nor {path.name}. Choose another one under resume, or {NEW_RUN}"
            )
        logger.info("SaRA Train: %s has finished already; its delta is used", folder.path.name)
        losses = [loss for loss, _ in folder.read_losses(steps)]
        validation = folder.read_validation(steps)
        return put_out(folder, path, validation), loss_map(losses, validation)


def best_of(validation: Sequence[tuple[int, float]], after: int = 0) -> tuple[int, float] | None:
    """Return step and loss of the lowest loss on the pictures held out after a step; None without any."""
    measured = [entry for entry in validation if entry[0] > after and math.isfinite(entry[1])]
    return min(measured, key=lambda entry: entry[1], default=None)


def put_out(folder: RunFolder, final: Path, validation: Sequence[tuple[int, float]]) -> Path:
    """Return the file of the delta that a run puts out: the final one, or by choice the best."""
    if folder.settings.put_out == LAST_STEP:
        return final
    best = best_of([entry for entry in validation if folder.best_path(entry[0]).is_file()])
    if best is None:
        logger.warning(
            "SaRA Train: %s has no delta of its lowest validation loss; the final one is put out",
            folder.path.name,
        )
        return final
    return folder.best_path(best[0])


def loss_map(losses: list[float], validation: list[tuple[int, float]]) -> dict[str, list]:
    """Return the losses as ComfyUI's Plot Loss Graph takes them, with the validation beside.

    It cannot draw a loss that is not finite, of a step that was skipped; such take the one before.
    """
    shown: list[float] = []
    latest = next(filter(math.isfinite, losses), 0.0)
    for loss in losses:
        latest = loss if math.isfinite(loss) else latest
        shown.append(latest)
    finite = [(step, loss) for step, loss in validation if math.isfinite(loss)]
    return {
        "loss": shown,
        "validation_step": [step for step, _ in finite],
        "validation_loss": [loss for _, loss in finite],
    }
