"""Folders and files as ComfyUI lists them."""

import contextlib
import functools
import logging
import os
from collections.abc import Collection
from pathlib import Path

import folder_paths

from ...sara_core.pictures.picture_folder import ENDINGS, REPEATS
from ...sara_core.pictures.video_folder import ENDINGS as VIDEO_ENDINGS
from ...sara_core.training.run_folder import STATE

logger = logging.getLogger("comfyui-sara")

FOLDER = "sara"
LORA_ENDING = "_lora.safetensors"  # of what a run writes for loaders of LoRAs
INPUT, DATASETS = "input", "datasets"


def register_folders() -> None:
    """Make models/sara and output/sara known, beside paths of extra_model_paths.yaml."""
    with contextlib.suppress(OSError):  # a place to put files into, if it can be made
        os.makedirs(os.path.join(folder_paths.models_dir, FOLDER), exist_ok=True)
    for root in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(FOLDER, os.path.join(root, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    # A folder type without extensions lists every file.
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | {".safetensors"})


def delta_names() -> list[str]:
    """List the delta files in the registered folders."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if is_delta_name(name)]


def is_delta_name(name: str) -> bool:
    """Tell a delta's file from a run's state and LoRA file."""
    file = os.path.basename(name)
    is_lora = file.endswith(f"_steps{LORA_ENDING}")
    return file.endswith(".safetensors") and file != STATE and not is_lora


def delta_path(name: str) -> str:
    """Return the full path of a listed delta file.

    Raises:
        ValueError: No such file in the registered folders.
    """
    if name not in delta_names():
        raise ValueError(
            f"there is no delta {name!r} in {', '.join(folder_paths.get_folder_paths(FOLDER))}; "
            "press R to refresh the list"
        )
    return folder_paths.get_full_path_or_raise(FOLDER, name)


def foreign_checkpoint_names() -> list[str]:
    """List the .pt files in the folders of deltas."""
    found = set()
    for root in folder_paths.get_folder_paths(FOLDER):
        found |= {path.relative_to(root).as_posix() for path in Path(root).rglob("*.pt")}
    return sorted(found)


def foreign_checkpoint_path(name: str) -> str:
    """Return the path of a file that `foreign_checkpoint_names` lists.

    Raises:
        ValueError: Another name.
    """
    if name not in foreign_checkpoint_names():
        raise ValueError(
            f"there is no {name!r} in {', '.join(folder_paths.get_folder_paths(FOLDER))}; put the "
            "file there and press R to refresh the list"
        )
    return folder_paths.get_full_path_or_raise(FOLDER, name)


def output_root() -> str:
    """Return the folder output/sara, in which runs and deltas are kept."""
    return os.path.abspath(os.path.join(folder_paths.get_output_directory(), FOLDER))


def new_output_path(prefix: str) -> str:
    """Return a path that does not exist yet, below the output folder, with a counter in its name."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    return os.path.join(folder, f"{name}_{counter:05}_.safetensors")


def picture_folders() -> dict[str, str]:
    """List the folders with pictures below input/ and datasets/, such as `input/cats`, with paths.

    Folders that hold pictures themselves come first, then those with pictures further down, and
    input/ itself last. Links that lead out of these roots are left out, and so are hidden folders.
    """
    return _by_rank(_folders_with(ENDINGS))


def video_folders() -> dict[str, str]:
    """List the folders with videos as `picture_folders` does, then those with pictures, which may be frames."""
    found = _by_rank(_folders_with(VIDEO_ENDINGS))
    return found | {name: path for name, path in picture_folders().items() if name not in found}


def _folders_with(endings: Collection[str]) -> dict[str, tuple[int, str]]:
    """Return rank and path of folders that hold files of some endings, or have such further down, by name."""
    roots = [(label, path) for label, paths in _roots().items() for path in paths]
    found: dict[str, tuple[int, str]] = {}
    for label, root in roots:
        for path, rank in _with_files(Path(root), endings).items():
            relative = path.relative_to(root).as_posix()
            name = label if relative == "." else f"{label}/{relative}"
            found.setdefault(name, (2 if name == INPUT else rank, str(path)))
    return found


def _by_rank(found: dict[str, tuple[int, str]]) -> dict[str, str]:
    return {name: path for name, (_, path) in sorted(found.items(), key=lambda x: (x[1][0], x[0]))}


def _with_files(root: Path, endings: Collection[str]) -> dict[Path, int]:
    """List folders with files of some endings: 0 for those that hold some, 1 for those with some further down."""
    real, ranks = root.resolve(), {}
    for parent, folders, files in os.walk(root):
        path = Path(parent)
        seen = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in seen if (path / name).resolve().is_relative_to(real)]
        for name in set(seen) - set(folders):
            _say_of_link(path / name)
        if any(Path(file).suffix.lower() in endings and not file.startswith(".") for file in files):
            ranks[path] = 0
    for path in list(ranks):
        for above in path.parents:
            if above.is_relative_to(root):
                ranks.setdefault(
                    above, 0 if REPEATS.fullmatch(path.name) and above == path.parent else 1
                )
    return ranks


@functools.cache
def _say_of_link(path: Path) -> None:
    logger.info(
        "SaRA Image Folder: %s is a link that leads out of its folder, so it is not listed; put the "
        "pictures there, or name their folder under datasets in extra_model_paths.yaml",
        path,
    )


def picture_folder(name: str) -> str:
    """Return the path of a folder that `picture_folders` lists.

    Raises:
        ValueError: Another name.
    """
    folders = picture_folders()
    if name not in folders:
        raise ValueError(
            f"there is no folder {name!r} with pictures; put one into ComfyUI's input folder and "
            "press R to refresh the list"
        )
    return folders[name]


def picture_file(folder: str, name: str) -> Path | None:
    """Return the path of a picture in a folder that goes by a name of `picture_folders`; None if there is none.

    Args:
        folder: Name of the folder, such as `input/cats`.
        name: Path of the picture within it.
    """
    label, _, below = folder.partition("/")
    if any(Path(part).anchor or ".." in Path(part).parts for part in (below, name)):
        return None  # before a path of another machine is touched
    for root in map(Path, _roots().get(label, ())):
        try:
            path = (root / below / name).resolve()
            if (
                path.is_relative_to(root.resolve())
                and path.suffix.lower() in ENDINGS
                and path.is_file()
            ):
                return path
        except (OSError, ValueError):  # such as a name that no file can have
            continue
    return None


def _roots() -> dict[str, list[str]]:
    """Return the folders below which pictures are looked for, by the first part of their names."""
    found = {INPUT: [folder_paths.get_input_directory()]}
    if DATASETS in folder_paths.folder_names_and_paths:  # since 0.33
        found[DATASETS] = folder_paths.get_folder_paths(DATASETS)
    return found


def video_folder(name: str) -> str:
    """Return the path of a folder that `video_folders` lists.

    Raises:
        ValueError: Another name.
    """
    folders = video_folders()
    if name not in folders:
        raise ValueError(
            f"there is no folder {name!r} with videos; put one into ComfyUI's input folder and press R to "
            "refresh the list"
        )
    return folders[name]


def cache_folder() -> str:
    """Return the folder in which encoded pictures and captions are kept."""
    return os.path.join(folder_paths.get_user_directory(), "sara_cache")
