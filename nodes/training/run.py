"""One training run: pictures and settings in, delta and losses out, everything saved on the way."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ...sara_core import SaraAdamW
from ...sara_core.training.gradient_checkpointing import checkpointed
from ...sara_core.training.run_folder import RunFolder
from ...sara_core.training.run_settings import COMPUTE_DTYPES, RunSettings
from ...sara_core.training.trainer import TrainingRun
from .. import host, output_folder
from . import memory
from .advice import epochs, likely_mistakes
from .ending import worse_than_it_began
from .examples import Examples
from .previews import Previews
from .reporter import Reporter
from .saver import Saver
from .session import Session
from .training_set import TrainingSet
from .widgets import NEW_RUN

logger = logging.getLogger("comfyui-sara")


def run(
    patcher,
    examples: Examples,
    folder: RunFolder,
    node_id: str | None,
    resume: bool = False,
    workflow: str | None = None,
    samplings: Sequence[host.Sampling] = (),
) -> tuple[Path, dict[str, list], dict]:
    """Train a MODEL in place, save what it learns, and put its base weights back.

    Whatever ends it, the delta and the state after the last whole step are in the folder.

    Args:
        patcher: The MODEL.
        examples: Latents, captions and the empty caption.
        folder: Where the run is kept, with its settings.
        node_id: Node that shows the progress.
        resume: Go on from the folder's state.
        workflow: Id of the workflow the node is in.
        samplings: What to make previews of.

    Returns:
        File of the final delta; the losses: `loss` of each step, and `validation_loss` after each of
        `validation_step`; and what the node's chart shows.
    """
    settings = folder.settings
    dtype = COMPUTE_DTYPES[settings.training_dtype]
    zeros = host.zero_rule(patcher, settings.zeros)
    dropout = settings.caption_dropout if examples.empty is not None else 0.0
    config = dataclasses.replace(settings, zeros=zeros, caption_dropout=dropout)
    with (
        contextlib.closing(folder),
        host.trainable(patcher, dtype, settings.offloading) as calls,
    ):
        pictures = TrainingSet(calls, examples, settings.validation_split, settings.seed)
        model = calls.model.diffusion_model
        scaler = None
        if host.needs_loss_scaling(patcher, dtype):
            scaler = torch.amp.GradScaler(calls.device.type)
        optimizer = SaraAdamW(model, distributed=False, **config.optimizer_options)
        try:
            training = TrainingRun(optimizer, pictures, config, scaler, host.free_memory)
            previews = Previews(calls, optimizer, list(samplings), folder)
            reporter = Reporter(folder, node_id, workflow)
            reporter.chart.epochs = epochs(settings, examples)
            saver = Saver(patcher, examples, training, previews, reporter)
            rates = saver.resume() if resume else []
            if training.step == settings.schedule_start > 0:  # more steps, and all fits
                folder.save_settings()
            for line in likely_mistakes(patcher, settings, examples) if not resume else ():
                reporter.warn(line)
            if (foreign := host.foreign_prediction(patcher)) is not None:
                reporter.warn(
                    "trained for {} prediction; the checkpoint is for {}".format(*foreign)
                )
            training.look_for_in_place_changes()
            with checkpointed(model, settings.gradient_checkpointing, training.in_place):
                memory.announce(calls, training, reporter)
                Session(training, previews, reporter, saver).train(rates)
            path = saver.finish()
            if (line := worse_than_it_began(saver.losses)) is not None:
                reporter.warn(line)
            return path, _loss_map(saver.losses, saver.validation), reporter.chart.finish()
        finally:
            optimizer.restore()


def new_folder(patcher, settings: RunSettings) -> RunFolder:
    """Make the folder of a new run on a MODEL.

    Raises:
        ValueError: Its name leads out of the output folder, or the MODEL's prediction is another.
        OSError: It cannot be written to.
    """
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
        _refuse_other_prediction(patcher, own)
        if more_steps and is_finished(folder):
            own = own.extended_by(more_steps, settings)
        folder.settings = own
    except BaseException:
        folder.close()
        raise
    return folder


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
    return output_folder.final_path(folder.path, folder.settings.steps).is_file()


def finished(folder: RunFolder) -> tuple[Path, dict[str, list]]:
    """Return what `run` returned when a run ended: its final delta's file, and the losses.

    Raises:
        ValueError: The run has not ended, or its delta was deleted.
    """
    with contextlib.closing(folder):
        steps = folder.settings.steps
        path = output_folder.final_path(folder.path, steps)
        if not path.is_file():
            raise ValueError(
                f"the run {folder.path.name} can neither be resumed nor has it finished: there is "
                f"neither its state nor {path.name}. Choose another one under resume, or {NEW_RUN}"
            )
        logger.info("SaRA Train: %s has finished already; its delta is used", folder.path.name)
        losses = [loss for loss, _ in folder.read_losses(steps)]
        return path, _loss_map(losses, folder.read_validation(steps))


def _loss_map(losses: list[float], validation: list[tuple[int, float]]) -> dict[str, list]:
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
