"""What a run's folder tells of its steps, read without disturbing the run."""

import contextlib
import csv
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .run_folder import LOSSES, SETTINGS, VALIDATION
from .run_settings import RunSettings

# Settings that change nothing by themselves.
NAMES_ALONE = {"output_name", "ended_at", "schedule_start"}


@dataclass(frozen=True)
class RunHistory:
    """A run's curves and settings.

    Args:
        name: Of the run.
        settings: What it was set to.
        losses: Step and loss of each step.
        validation: Step and loss on the pictures held out.
    """

    name: str
    settings: RunSettings
    losses: list[tuple[int, float]]
    validation: list[tuple[int, float]]


def read_history(folder: Path, name: str) -> RunHistory:
    """Read what is there of a run, also while it goes on.

    Raises:
        ValueError: It has made no step yet, or its settings cannot be read.
    """
    try:
        saved = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        settings = RunSettings.read(saved)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"the settings of the run {name} cannot be read: {error}") from error
    losses = _pairs(folder / LOSSES)
    if not losses:
        raise ValueError(f"the run {name} has made no step yet, so there is nothing to compare")
    return RunHistory(name, settings, losses, _pairs(folder / VALIDATION))


def differing(histories: Sequence[RunHistory]) -> list[str]:
    """Name the settings in which runs differ, of those that they go by."""
    every = [_in_use(history.settings) for history in histories]
    return [
        field.name
        for field in dataclasses.fields(RunSettings)
        if len({repr(values.get(field.name)) for values in every}) > 1
    ]


def _in_use(settings: RunSettings) -> dict:
    unused = NAMES_ALONE | ({"fraction", "select_from"} if settings.threshold else set())
    return {k: v for k, v in dataclasses.asdict(settings).items() if k not in unused}


def _pairs(path: Path) -> list[tuple[int, float]]:
    """Read the first two columns of a table by step; of steps that were retried, the last counts."""
    found: dict[int, float] = {}
    if path.is_file():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.reader(file):
                # The head, and a row that is being written.
                with contextlib.suppress(ValueError, IndexError):
                    found[int(row[0])] = float(row[1])
    return sorted(found.items())
