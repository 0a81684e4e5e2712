"""Names of runs and files below output/sara."""

import os
from pathlib import Path

from ..sara_core.training.run_folder import SETTINGS, STATE
from . import host

MAX_NAME = 100


def split_output_name(name: str) -> tuple[str, str]:
    """Return the folder below output/sara and the file name that a name such as `a/b` stands for.

    Raises:
        ValueError: The name is empty or leads out of the output folder.
    """
    root = host.output_root()
    path = os.path.abspath(os.path.join(root, name.strip()))
    if "\0" in name or path == root or not Path(path).is_relative_to(root):
        raise ValueError(
            f"the name {name!r} is empty or leads out of the output folder {root}; give a plain "
            "name such as style"
        )
    if len(os.path.basename(path)) > MAX_NAME:
        raise ValueError(f"the name {name!r} is longer than {MAX_NAME} characters; shorten it")
    return os.path.dirname(path), os.path.basename(path)


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
    return file.endswith(".safetensors") and file != STATE and not is_hidden


def _is_final(folder: str, file: str) -> bool:
    own = os.path.basename(folder).rpartition("_")[0]
    return file.startswith(f"{own}_") and file.endswith("_steps.safetensors")


def final_path(folder: str | os.PathLike, steps: int) -> Path:
    """Return where a run of so many steps in a folder such as `style_00001` leaves its delta."""
    folder = Path(folder)
    return folder / f"{folder.name.rpartition('_')[0]}_{steps}_steps.safetensors"


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
