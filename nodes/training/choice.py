"""The weights that a run trains, where it is not their size that says so."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from ...sara_core import Selection, SparseDelta
from ...sara_core.optimizer import packages
from ...sara_core.optimizer.take_over import first_of_each, selection_of
from ...sara_core.training.choosing import Choosing
from ...sara_core.training.gradient_checkpointing import checkpointed
from ...sara_core.training.out_of_memory import is_out_of_memory
from ...sara_core.training.passes import Passes
from ...sara_core.training.processes import Processes
from ...sara_core.training.run_folder import RunFolder
from ...sara_core.training.run_settings import RunSettings
from ...sara_core.weights.parameters import choose_parameters
from .. import host, output_folder
from .ending import add_line, ending_together
from .reporter import Reporter
from .training_set import TrainingSet

SHARE = 0.25  # of the device's free memory, that choosing may take if it is more than the run will


def chosen_by_gradient(
    calls: "host.ModelCalls",
    pictures: TrainingSet,
    settings: RunSettings,
    processes: Processes,
    is_float16: bool,
    resume: bool,
    folder: RunFolder | None = None,
    reporter: Reporter | None = None,
) -> Selection:
    """Choose weights of a MODEL by gradient, or take those that a run has chosen when it began.

    Args:
        calls: The MODEL, loaded for training.
        pictures: Of the run.
        settings: Of the run.
        processes: Those that train together.
        is_float16: Gradients are.
        resume: The run is taken up again.
        folder: Of the run, in the first process.
        reporter: Tells what is done, in the first process.
    """
    model = calls.model.diffusion_model
    known = None
    if resume:
        parameters = choose_parameters(model, settings.include, settings.exclude)
        delta = _finished(settings, processes, folder)
        if delta is None:
            return first_of_each(parameters)  # until the state is taken over
        known = selection_of(delta, parameters)
    has_rates = bool(pictures.regularisation) and settings.optimizer == packages.ADAMW
    if known is not None and not has_rates:
        return known
    with ending_together(), _telling_of_memory():
        found = _choose(calls, pictures, settings, processes, is_float16, reporter, known)
    return found if has_rates else dataclasses.replace(found, weight_rates={})


def _choose(calls, pictures, settings, processes, is_float16, reporter, known) -> Selection:
    passes = Passes(pictures, settings)
    passes.look_for_in_place_changes()
    used, total = host.memory_in_use()
    on_device = settings.trained_in == "device"  # else the sums are in main memory, too
    progress: list[host.Progress] = []
    choosing = Choosing(
        pictures, settings, passes, processes, host.free_memory,
        lambda: [each.step() for each in progress],
    )  # fmt: skip

    def tell(part: int, of: int) -> None:
        if reporter is None:
            return
        progress[:] = progress or [host.Progress(of * choosing.num_passes, reporter.node_id)]
        kept = ", beside what the regularisation pictures would lose by it"
        what = "choosing the weights" if known is None else "choosing the weights' rates"
        reporter.say(
            f"{what} by what they learn{kept if pictures.regularisation else ''}: "
            f"part {part} of {of} of the model"
        )

    model = calls.model.diffusion_model
    with checkpointed(model, settings.gradient_checkpointing, passes.in_place):
        return choosing.choose(
            model, settings.fraction, is_float16, SHARE * (total - used) if on_device else 0,
            include=settings.include, exclude=settings.exclude, tell=tell,
            chosen=None if known is None else known.index,
        )  # fmt: skip


@contextmanager
def _telling_of_memory() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            add_line(error, "SaRA Train: memory ran out while weights were chosen by gradient.")
        raise


def _finished(settings, processes, folder) -> SparseDelta | None:
    """Return the delta of a run that has finished and is to make more steps, if its state is gone."""

    def load() -> SparseDelta | None:
        if folder.read_state() is not None:
            return None
        path = output_folder.final_path(folder.path, settings.schedule_start)
        return SparseDelta.load(path) if path.is_file() else None

    return processes.lead(load)
