"""Names of runs and files below output/sara."""

import os
import re
import time
from pathlib import Path

from ..sara_core.training.run_folder import JOB, LOSSES, SETTINGS, STATE
from . import host

MAX_BYTES = 255  # of one name, on nearly all file systems
MAX_PATH = 259  # characters on Windows
# The longest that is added to a name: a temporary file's name around that of the LoRA file.
ADDED = len(f"._1000000_steps_lora.safetensors.{'0' * 32}.tmp")
DATE_PARTS = {  # as in ComfyUI's page, longer ones before their beginnings
    "yyyy": "%Y", "yy": "%y", "MM": "%m", "dd": "%d", "hh": "%H", "mm": "%M", "ss": "%S",
}  # fmt: skip
SHORT_PARTS = {"M": "tm_mon", "d": "tm_mday", "h": "tm_hour", "m": "tm_min", "s": "tm_sec"}
TIMES = {"year": "%Y", "month": "%m", "day": "%d", "hour": "%H", "minute": "%M", "second": "%S"}


def with_date(name: str) -> str:
    """Fill in `%year%` and the like, and `%date:yyyy-MM-dd%`, as in Save Image."""
    now = time.localtime()

    def part(match: re.Match) -> str:
        text = match[0]
        return (
            time.strftime(DATE_PARTS[text], now)
            if text in DATE_PARTS
            else str(getattr(now, SHORT_PARTS[text]))
        )

    def date(match: re.Match) -> str:
        return re.sub("|".join([*DATE_PARTS, *SHORT_PARTS]), part, match[1] or "yyyyMMddhhmmss")

    name = re.sub(r"%date(?::([^%]*))?%", date, name)
    return re.sub(f"%({'|'.join(TIMES)})%", lambda match: time.strftime(TIMES[match[1]], now), name)


def split_output_name(name: str) -> tuple[str, str]:
    """Return the folder below output/sara and the file name that a name such as `a/b` stands for.

    Raises:
        ValueError: The name is empty, leads out of the output folder, or is too long to save under.
    """
    root = host.output_root()
    path = os.path.abspath(os.path.join(root, with_date(name).strip()))
    if "\0" in name or path == root or not Path(path).is_relative_to(root):
        raise ValueError(
            f"the name {name!r} is empty or leads out of the output folder {root}; give a plain "
            "name such as style"
        )
    refuse_long(path)
    return os.path.dirname(path), os.path.basename(path)


def checked_prefix(prefix: str) -> str:
    """Fill the date into a name below the output folder, as Save Image's, and check its length.

    Raises:
        ValueError: A name in it is too long to save under.
    """
    prefix = with_date(prefix)
    refuse_long(os.path.join(os.path.dirname(host.output_root()), prefix))
    return prefix


def refuse_long(path: str) -> None:
    """Refuse a path whose names have no room for what is added to them when a run is saved.

    Raises:
        ValueError: A name has too many bytes, or on Windows the path too many characters.
    """
    for part in Path(os.path.relpath(path, os.path.dirname(host.output_root()))).parts:
        size, room = len(os.fsencode(part)), MAX_BYTES - ADDED
        if size > room:
            raise ValueError(
                f"the name {part[:40]!r}... has {size} bytes, but with what is added when it is saved "
                f"there is room for {room} (a Chinese character takes 3); shorten it"
            )
    length = len(path) + len(os.path.basename(path)) + len("_00001/") + ADDED
    if os.name == "nt" and length > MAX_PATH:
        raise ValueError(
            f"the path of {os.path.basename(path)!r} would have {length} characters with what is added; "
            f"Windows takes {MAX_PATH}. Shorten the name, or move ComfyUI's output folder up"
        )


def output_relative(path: str | os.PathLike) -> str:
    """Return a path relative to output/sara, as Load SaRA Delta lists it."""
    return os.path.relpath(path, host.output_root())


def view_subfolder(path: str | os.PathLike) -> str:
    """Return a folder below output/sara as the browser asks for files in it: `sara/style_00001`."""
    return f"{host.FOLDER}/{output_relative(path)}".replace(os.sep, "/")


def resumable_runs() -> list[str]:
    """List the runs below output/sara that can be resumed or have finished, by folder."""
    root = host.output_root()
    found = [
        folder
        for folder, _, files in os.walk(root)
        if STATE in files or (SETTINGS in files and any(_is_final(folder, file) for file in files))
    ]
    return sorted(output_relative(folder) for folder in found)


def runs_with_losses() -> list[str]:
    """List the runs below output/sara that have made a step, by folder."""
    found = [
        folder
        for folder, _, files in os.walk(host.output_root())
        if SETTINGS in files and LOSSES in files
    ]
    return sorted(map(output_relative, found))


def run_of_job(job: str) -> str | None:
    """Return the newest run that a job has begun, by folder, if it can be resumed or has finished."""
    root = host.output_root()
    found = []
    for name in resumable_runs():
        mark = Path(root, name, JOB)
        if mark.is_file() and mark.read_text(encoding="utf-8") == job:
            found.append((mark.stat().st_mtime_ns, name))
    return max(found)[1] if found else None


def runs_with_deltas() -> list[str]:
    """List the folders below output/sara that hold deltas, by name."""
    root = host.output_root()
    found = [folder for folder, _, files in os.walk(root) if any(map(_is_delta, files))]
    return sorted(output_relative(folder) for folder in found if folder != root)


def deltas_of_run(name: str) -> list[Path]:
    """Return the delta files in a folder that `runs_with_deltas` lists, sorted by name.

    Raises:
        ValueError: Another name.
    """
    if name not in runs_with_deltas():
        raise ValueError(
            f"there is no folder {name!r} with deltas in output/sara; press R to refresh the list"
        )
    folder = Path(host.output_root(), name)
    return sorted(path for path in folder.iterdir() if _is_delta(path.name))


def _is_delta(file: str) -> bool:
    is_hidden = file.startswith(".")  # of a save under way
    return host.is_delta_name(file) and not is_hidden


def _is_final(folder: str, file: str) -> bool:
    own = os.path.basename(folder).rpartition("_")[0]
    return file.startswith(f"{own}_") and file.endswith("_steps.safetensors")


def final_path(folder: str | os.PathLike, steps: int) -> Path:
    """Return where a run of so many steps in a folder such as `style_00001` leaves its delta."""
    folder = Path(folder)
    return folder / f"{folder.name.rpartition('_')[0]}_{steps}_steps.safetensors"


def lora_path(delta: Path) -> Path:
    """Return where the LoRA file of a run's final delta goes, beside it."""
    return delta.with_name(delta.name.removesuffix(".safetensors") + host.LORA_ENDING)


def run_path(name: str) -> str:
    """Return the full path of a run that can be resumed, or that has finished.

    Raises:
        ValueError: No such run.
    """
    root = host.output_root()
    path = os.path.abspath(os.path.join(root, name))
    is_below = path != root and Path(path).is_relative_to(root)
    if not is_below or not os.path.isfile(os.path.join(path, SETTINGS)):
        raise ValueError(
            f"there is no run {name!r} in output/sara; it was moved or deleted. Press R to refresh "
            "the list"
        )
    return path
