"""One training run: pictures and settings in, delta and losses out, everything saved on the way."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ...sara_core import SaraAdamW, Selection
from ...sara_core.files.state_file import snapshot
from ...sara_core.training.gradient_checkpointing import checkpointed
from ...sara_core.training.processes import FINE, Processes
from ...sara_core.training.run_folder import RunFolder
from ...sara_core.training.run_settings import BY_GRADIENT, COMPUTE_DTYPES, RunSettings
from ...sara_core.training.trainer import TrainingRun
from .. import host
from . import memory
from .advice import likely_mistakes
from .choice import chosen_by_gradient
from .ending import ending_together, worse_than_it_began
from .epochs import epochs_of
from .examples import Examples, differences
from .folders import loss_map
from .metadata import identity
from .previews import Previews
from .reporter import Reporter
from .saver import Saver
from .session import Session
from .training_set import TrainingSet
from .wishes import Wishes


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

    Whatever ends it, the delta and the state after the last whole step are in the folder. Where
    several processes train together, this is for the first; the others `follow`.

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
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(folder))
        reporter = Reporter(folder, node_id, workflow)
        chosen = functools.partial(chosen_by_gradient, folder=folder, reporter=reporter)
        calls, training = stack.enter_context(prepared(patcher, examples, settings, resume, chosen))
        previews = Previews(calls, training.optimizer, list(samplings), folder)
        saver = Saver(patcher, examples, training, previews, reporter)
        training.processes.agree(FINE)
        rates = _resume(training, saver) if resume else []
        if training.step == settings.schedule_start > 0:  # more steps, and all fits
            folder.save_settings()
        if job := host.job(node_id):  # not before, or a run that was refused would be gone on with
            folder.sign(job)
        reporter.chart.can_preview = bool(samplings)
        reporter.chart.epochs = epochs_of(settings, examples, training.batch_size)
        if not resume:
            for line in likely_mistakes(patcher, settings, examples, training.batch_size):
                reporter.warn(line)
        if (foreign := host.foreign_prediction(patcher)) is not None:
            reporter.warn("trained for {} prediction; the checkpoint is for {}".format(*foreign))
        training.look_for_in_place_changes()
        with _checkpointed(calls, settings, training):
            need = memory.announce(calls, training, reporter)
            if settings.offloading:
                reporter.say(memory.keep_what_fits(calls, settings, need))
            with Wishes(folder.path.name) as wishes:
                Session(training, previews, reporter, saver, wishes).train(rates)
        with _telling_of_the_end(reporter):
            path = saver.finish()
            if (line := worse_than_it_began(saver.losses)) is not None:
                reporter.warn(line)
            training.processes.agree(FINE)
            return path, loss_map(saver.losses, saver.validation), reporter.chart.finish()


@contextlib.contextmanager
def _telling_of_the_end(reporter: Reporter) -> Iterator[None]:
    """Have the chart say so if a run that has made its steps does not end well."""
    try:
        yield
    except BaseException as error:
        text = str(error) or type(error).__name__
        reporter.chart.stop(text, isinstance(error, host.Cancelled))
        raise


def follow(patcher, examples: Examples, settings: RunSettings, resume: bool) -> None:
    """Make the steps of a run that the first of several processes shows and saves."""
    with prepared(patcher, examples, settings, resume) as (calls, training):
        training.processes.agree(FINE)
        if resume:
            training.load_state(training.processes.lead(lambda: {}))
        training.look_for_in_place_changes()
        with _checkpointed(calls, settings, training):
            if settings.offloading:
                need = memory.measure(calls, training, settings)
                memory.keep_what_fits(calls, settings, need)
            for _ in training:
                pass
        training.processes.agree(FINE)


@contextlib.contextmanager
def prepared(
    patcher,
    examples: Examples,
    settings: RunSettings,
    resume: bool = False,
    chosen: Callable[..., Selection] = chosen_by_gradient,
) -> Iterator[tuple["host.ModelCalls", TrainingRun]]:
    """Load a MODEL and select what trains; afterwards put its base weights back.

    What goes wrong meanwhile is told to the other processes.

    Args:
        patcher: The MODEL.
        examples: Latents, captions and the empty caption.
        settings: Of the run.
        resume: It is taken up again.
        chosen: Chooses weights, where their gradient is gone by.

    Raises:
        ValueError: They have other models, pictures or captions.
    """
    dtype = COMPUTE_DTYPES[settings.training_dtype]
    zeros = host.zero_rule(patcher, settings.zeros)
    dropout = settings.caption_dropout if examples.empty is not None else 0.0
    config = dataclasses.replace(settings, zeros=zeros, caption_dropout=dropout)
    processes = host.processes()
    with host.trainable(patcher, dtype, settings.offloading, settings.trained_in) as calls:
        calls.guidance = settings.guidance if settings.guidance >= 0 else None
        pictures = TrainingSet(calls, examples, settings.validation_split, settings.seed)
        _refuse_different(
            processes, lambda: identity(patcher, examples, pictures.validation, settings.offloading)
        )
        scaler = None
        is_float16 = host.needs_loss_scaling(patcher, dtype)
        if is_float16:
            scaler = torch.amp.GradScaler(calls.device.type)
            if (
                settings.trained_in == "main memory"
            ):  # where the scale has to be, to be read at once
                scaler.scale(torch.zeros(()))
        optimizer = _optimizer(
            calls,
            config,
            processes,
            functools.partial(chosen, calls, pictures, config, processes, is_float16, resume),
        )
        try:
            training = TrainingRun(optimizer, pictures, config, scaler, host.free_memory, processes)
            with ending_together(), _told(training.processes):
                yield calls, training
        finally:
            optimizer.restore()


def _optimizer(
    calls: "host.ModelCalls",
    config: RunSettings,
    processes: Processes,
    choose: Callable[[], Selection],
) -> SaraAdamW:
    """Take hold of the weights that train; what has chosen them is let go."""
    options = config.optimizer_options
    if config.select_by == BY_GRADIENT:
        options = {name: v for name, v in options.items() if name not in config.selection_rule}
        options["selection"] = choose()
    return SaraAdamW(calls.model.diffusion_model, distributed=processes.size > 1, **options)


@contextlib.contextmanager
def _told(processes: Processes) -> Iterator[None]:
    """Tell the other processes of an error.

    All stay until the first has saved, as torchrun ends the others soon after one has ended.
    """
    try:
        yield
    except BaseException as error:
        processes.fail(error)
        with contextlib.suppress(Exception):
            processes.gather(lambda: None)
        raise


def _refuse_different(processes: Processes, describe: Callable[[], dict]) -> None:
    first, *others = processes.gather(describe)
    for rank, own in enumerate(others, 1):
        if wrong := differences(first, own, "rank 0"):
            raise ValueError(
                f"rank {rank} does not train the same as rank 0: {'; '.join(wrong)}. All processes "
                "need the same workflow, model and pictures"
            )


def _resume(training: TrainingRun, saver: Saver) -> list[float]:
    """Take a run up again, in all processes; returns the learning rates of the steps behind it."""
    rates: list[float] = []
    processes = training.processes

    def state() -> dict | None:
        rates.extend(saver.resume())
        return snapshot(training.state()) if processes.size > 1 else None

    processes.lead(state)
    return rates


def _checkpointed(calls: "host.ModelCalls", settings: RunSettings, training: TrainingRun):
    model = calls.model.diffusion_model
    return checkpointed(model, settings.gradient_checkpointing, training.in_place)
