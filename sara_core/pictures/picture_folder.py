"""Find the pictures of a folder and their captions, as people and older trainers lay them out."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .captions import CAPTION_ENDINGS, TABLES, Problem, caption_beside, read_tables

ENDINGS = frozenset(
    ".png .jpg .jpeg .jpe .jfif .mpo .webp .bmp .tif .tiff .gif .avif .heic .heif".split()
)
REPEATS = re.compile(r"(\d+)_(.*)")
MOST_REPEATS = 500


@dataclass(frozen=True)
class PictureFile:
    """A picture on disk.

    Args:
        path: Of the picture.
        name: The same below the folder, with forward slashes.
        caption: Its text on one line, or None if there is none.
        source: Where the caption is from: an ending, the name of a table, "folder name", or "".
        repeats: How often it comes in an epoch.
    """

    path: Path
    name: str
    caption: str | None
    source: str
    repeats: int


def find_pictures(folder: Path) -> tuple[list[PictureFile], list[Problem]]:
    """List the pictures of a folder with their captions, in natural order of their names.

    Pictures lie in the folder itself, in folders such as `10_name` in it (ten repeats, and `name` as
    caption), or where `metadata.jsonl` or `captions.json` in it says. Captions come from a text file
    beside the picture, before these tables, before the folder's name.

    Args:
        folder: An existing folder. Nothing outside of it is read, whatever links or tables say.

    Returns:
        The pictures, and what was wrong with files that were to be one or to caption one.
    """
    root = folder.resolve()
    table, problems = read_tables(folder, root)
    found, listed = [], set()
    beside: dict[Path, dict[str, Path]] = {}
    for path, repeats, label in _candidates(folder, table, problems):
        name = path.relative_to(folder).as_posix()
        if name in listed:
            continue
        listed.add(name)
        if not path.resolve().is_relative_to(root):
            problems.append(Problem(name, "a link that leads out of the folder"))
            continue
        try:
            caption, source = caption_beside(path, root, beside)
        except (OSError, ValueError) as error:
            problems.append(Problem(name, f"its caption cannot be read: {error}"))
            continue
        if caption is None and name in table:
            caption, source = table[name]
        if caption is None and label:
            caption, source = label, "folder name"
        found.append(PictureFile(path, name, caption, source, repeats))
    problems += [
        Problem(name, f"named in {source}, but there is no such picture")
        for name, (_, source) in table.items()
        if name not in listed
    ]
    return sorted(found, key=lambda file: _natural(file.name)), problems


def describe_files(folder: Path) -> list[tuple]:
    """Describe every picture and caption file, such that any change to one changes the result."""
    facts: list[tuple] = []
    for path in [folder, *folder.rglob("*")]:
        ending = path.suffix.lower()
        if ending in ENDINGS or ending in CAPTION_ENDINGS or path.name in TABLES:
            try:
                status = path.stat()
            except OSError:
                facts.append((path.relative_to(folder).as_posix(), "unreadable"))
                continue
            facts.append(
                (path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns,
                 status.st_ctime_ns)
            )  # fmt: skip
    return sorted(facts)


def _candidates(
    folder: Path, table: dict, problems: list[Problem]
) -> Iterator[tuple[Path, int, str]]:
    """Yield paths with repeats and the caption their folder stands for."""
    for path in _listed(folder, folder, problems):
        match = REPEATS.fullmatch(path.name)
        if match and path.is_dir():
            repeats = int(match[1])
            if not 0 < repeats <= MOST_REPEATS:
                reason = (
                    f"its name asks for {repeats} repeats, so it is left out; rename the folder"
                )
                problems.append(Problem(path.name, reason))
                continue
            label = match[2].replace("_", " ").strip()
            for inner in _listed(path, folder, problems):
                if _is_picture(inner):
                    yield inner, repeats, label
        elif _is_picture(path):
            yield path, 1, ""
    for name in table:
        path = folder / name
        if _is_picture(path):
            yield path, 1, ""


def _listed(path: Path, folder: Path, problems: list[Problem]) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError as error:
        problems.append(Problem(path.relative_to(folder).as_posix(), f"cannot be read: {error}"))
        return []


def _is_picture(path: Path) -> bool:
    hidden = path.name.startswith(".")  # such as macOS' ._ companions
    return not hidden and path.suffix.lower() in ENDINGS and os.path.isfile(path)


def _natural(name: str) -> list:
    """Sort key by which picture2 comes before picture10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.casefold())
        for part in re.split(r"(\d+)", name)
    ] + [(2, 0, name)]
