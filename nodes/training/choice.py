"""The weights that a run trains, where it is not their size that says so."""

from collections.abc import Callable

from ...sara_core import Selection, SparseDelta
from ...sara_core.optimizer.take_over import selection_of
from ...sara_core.training.choosing import Choosing
from ...sara_core.training.gradient_checkpointing import checkpointed
from ...sara_core.training.passes import Passes
from ...sara_core.training.processes import Processes
from ...sara_core.training.run_folder import RunFolder
from ...sara_core.training.run_settings import RunSettings
from ...sara_core.weights.parameters import choose_parameters
from .. import host, output_folder
from .training_set import TrainingSet

SHARE = 0.25  # of the free memory, that choosing may take beside what the run will


def choose(
    calls: "host.ModelCalls",
    pictures: TrainingSet,
    settings: RunSettings,
    processes: Processes,
    is_float16: bool,
    say: Callable[[str], object],
) -> Selection:
    """Choose weights of a MODEL by gradient.

    Args:
        calls: The MODEL, loaded for training.
        pictures: Of the run.
        settings: Of the run.
        processes: Those that train together.
        is_float16: Gradients are.
        say: Tells what is done.
    """
    passes = Passes(pictures, settings)
    passes.look_for_in_place_changes()
    used, total = host.memory_in_use()
    what = "what they learn"
    if pictures.regularisation:
        what += " beside what the regularisation pictures would lose by it"

    def tell(part: int, of: int) -> None:
        say(f"choosing the weights by {what}: part {part} of {of} of the model")

    model = calls.model.diffusion_model
    with checkpointed(model, settings.gradient_checkpointing, passes.in_place):
        return Choosing(pictures, settings, passes, processes, host.free_memory).choose(
            model, settings.fraction, is_float16, SHARE * (total - used),
            include=settings.include, exclude=settings.exclude, tell=tell,
        )  # fmt: skip


def chosen_before(
    calls: "host.ModelCalls",
    settings: RunSettings,
    processes: Processes,
    folder: RunFolder | None,
) -> Selection | None:
    """Return what a finished run has trained, from its delta; None if its state alone tells.

    Args:
        calls: The MODEL, loaded for training.
        settings: Of the run.
        processes: Those that train together.
        folder: Of the run, in the first of them.
    """

    def load() -> SparseDelta | None:
        path = output_folder.final_path(folder.path, settings.schedule_start)
        return SparseDelta.load(path) if path.is_file() else None

    delta = processes.lead(load)
    if delta is None:
        return None
    model = calls.model.diffusion_model
    return selection_of(delta, choose_parameters(model, settings.include, settings.exclude))
