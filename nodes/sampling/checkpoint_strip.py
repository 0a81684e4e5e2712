"""The checkpoints of a run as its node shows them before anything is run, and the choice among them."""

from collections.abc import Mapping
from fnmatch import fnmatch

from safetensors import SafetensorError, safe_open

from ...sara_core.training.run_folder import BESTS, CHECKPOINTS
from .. import output_folder

PATH = "/sara/checkpoints"


def look(query: Mapping[str, str]) -> dict:
    """Say what deltas the run `name` has, each step once, by step.

    Returns:
        `error` alone if there is no such run; else `checkpoints`: `file`, `step`, whether it is the `best`
        by its loss on pictures held out, and its `picture` as a data URL, or none; and `broken`: files that
        cannot be read.
    """
    try:
        files = output_folder.deltas_of_run(query.get("name", ""))
    except ValueError as error:
        return {"error": str(error)}
    found, broken = [], []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                told = opened.metadata() or {}
        except (OSError, SafetensorError) as error:
            broken.append(f"{file.name}: {error}")
            continue
        found.append(
            {
                "file": file.name,
                "step": step_of(told),
                "best": fnmatch(file.name, BESTS),
                "picture": told.get("modelspec.thumbnail"),
            }
        )
    shown = each_step_once(found, lambda entry: (entry["step"], entry["file"]))
    return {"checkpoints": shown, "broken": broken}


def step_of(metadata: Mapping[str, str]) -> int:
    """Return how many steps a delta was trained; 0 if it does not say."""
    text = metadata.get("sara.steps", "")
    return int(text) if text.isdecimal() else 0


def each_step_once(found: list, facts) -> list:
    """Sort entries by step, without checkpoints of the step that the run's best is of.

    Args:
        found: Of one run.
        facts: Returns step and file name of an entry.
    """
    found = sorted(found, key=lambda entry: facts(entry)[0])
    best = {step for step, name in map(facts, found) if fnmatch(name, BESTS)}

    def is_shown(entry) -> bool:
        step, name = facts(entry)
        return step not in best or not fnmatch(name, CHECKPOINTS)

    return list(filter(is_shown, found))


def files_of_steps(run: str, steps: set[int]) -> list[str]:
    """Return the files of some steps of a run, as `look` finds them.

    Raises:
        ValueError: A step of which there is no checkpoint.
    """
    told = look({"name": run})
    there = {entry["step"]: entry["file"] for entry in told["checkpoints"]}
    if missing := sorted(steps - there.keys()):
        raise ValueError(
            f"{run} has no checkpoint of step {', '.join(map(str, missing))}; there are "
            f"{', '.join(map(str, sorted(there)))}"
            + "".join(f"; {line}" for line in told["broken"])
        )
    return [there[step] for step in sorted(steps)]


def chosen_steps(text: str) -> set[int]:
    """Read the steps that are to be loaded; none for all.

    Raises:
        ValueError: Something else than numbers.
    """
    parts = text.replace(",", " ").split()
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise ValueError(f"steps holds {wrong[0]!r}; expected numbers such as 100, 300, or nothing")
    return set(map(int, parts))
