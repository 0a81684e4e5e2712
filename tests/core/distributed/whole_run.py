"""Runs of `TrainingRun` in several processes, started by torchrun or, for comparison, in one.

usage: torchrun --nproc-per-node N -m tests.core.distributed.whole_run FOLDER SCENARIO...

Each process leaves FOLDER/SCENARIO_RANK.pt. A batch has twelve pictures, however many processes there are.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sara_core import SaraAdamW
from sara_core.training.choosing import Choosing
from sara_core.training.trainer import TrainingRun

from ..training.small_run import make
from .torchrun import leave

BATCH = 12
OTHERS = {"steps": 12, "grad_accumulation_steps": 2}


def place():
    """Rank and number of processes."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def run(steps=12, state=None, fail=None, batch=None, end_after=None, **settings):
    """Train up to a step; returns what was learned and seen.

    Args:
        steps: After which the loop is left.
        state: To go on from.
        fail: Called before each pass of the last process.
        batch: Pictures of a process.
        end_after: Step after which the first process says that it is enough.
        settings: Of the run.
    """
    rank, size = place()
    fails = (lambda count: None) if fail is None or rank != size - 1 else fail
    net, training = make(fails, batch_size=batch or BATCH // size, **OTHERS, **settings)
    if state is not None:
        training.load_state(state)
    losses, error = [], ""
    try:
        for report in training:
            losses.append((report.loss, report.stage, report.skipped))
            if report.step == end_after and rank == 0:
                training.end()
            if report.step == steps:
                break
    except RuntimeError as found:
        error = f"{type(found).__name__}: {found}"
    entries = training.optimizer.delta().entries
    return {
        "entries": {name: (entry.index, entry.values) for name, entry in entries.items()},
        "losses": losses,
        "error": error,
        "step": training.step,
        "parts": training.passes.num_parts,
        "state": training.state(),
    }


class Failing:
    """Fails in one of the model's passes."""

    def __init__(self, at, error):
        self.at, self.error, self.count = at, error, 0

    def __call__(self, count):
        self.count += 1
        if self.count == self.at:
            raise self.error


class NotFinite:
    """Makes one pass of the model not finite."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def __call__(self, count):
        self.count += 1
        return float("nan") if self.count == self.at else None


def resumed(folder, batch=None):
    """Go on with four steps from what other processes have left."""
    path = Path(folder, "resume.pt")
    state = torch.load(path, weights_only=True) if path.is_file() else None
    return run(4 + (state["step"] if state else 0), state, batch=batch)


def chosen(fail=None, keeps=False):
    """Choose weights by gradient, beside what is to be kept or not, and train them."""
    rank, size = place()
    fails = (lambda count: None) if fail is None or rank != size - 1 else fail
    net, training = make(fails, batch_size=BATCH // size, **OTHERS)
    training.optimizer.restore()
    task, config, processes = training.task, training.config, training.processes
    if keeps:
        task.training, task.regularisation = range(4), range(4, 7)
    choosing = Choosing(task, config, training.passes, processes)
    selection = choosing.choose(net, 0.3, by_parameter=True)
    optimizer = SaraAdamW(net, selection=selection, lr=1e-2)
    losses = [(report.loss,) for report in TrainingRun(optimizer, task, config)]
    entries = optimizer.delta().entries
    return {
        "entries": {name: (entry.index, entry.values) for name, entry in entries.items()},
        "losses": losses,
        "parts": training.passes.num_parts,
    }


SCENARIOS = {
    "chosen": lambda folder: chosen(),
    "chosen_to_keep": lambda folder: chosen(keeps=True),
    "chosen_in_parts": lambda folder: chosen(Failing(3, torch.OutOfMemoryError("out of memory"))),
    "plain": lambda folder: run(),
    "scaled": lambda folder: run(scaler=torch.amp.GradScaler("cpu", 4.0, growth_interval=3)),
    "error": lambda folder: run(fail=Failing(7, RuntimeError("the disk is on fire"))),
    "no_memory": lambda folder: run(fail=Failing(7, torch.OutOfMemoryError("out of memory"))),
    "not_finite": lambda folder: run(fail=NotFinite(7)),
    "ended": lambda folder: run(end_after=5),
    "resumed": resumed,
    "resumed_of_three": lambda folder: resumed(folder, BATCH // 4),
}


def main(folder, *names):
    leave(lambda name: SCENARIOS[name](folder), folder, names or SCENARIOS)


if __name__ == "__main__":
    main(*sys.argv[1:])
