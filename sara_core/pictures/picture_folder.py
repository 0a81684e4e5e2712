"""Find the pictures of a folder and their captions, as people and older trainers lay them out."""

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .captions import CaptionFiles, Problem, read_tables
from .strays import has_picture_inside, is_hidden, strays

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
        lines: Of its caption; none if there is no caption.
        source: Where the caption is from: an ending, the name of a table, "folder name", or "".
        repeats: How often it comes in an epoch.
    """

    path: Path
    name: str
    lines: tuple[str, ...]
    source: str
    repeats: int

    @property
    def caption(self) -> str | None:
        """All of its caption on one line, or None if there is none."""
        return " ".join(self.lines) or None


@dataclass(frozen=True)
class Kind:
    """What is looked for in a folder.

    Args:
        word: For one of it.
        is_one: Tells whether a file, or a folder, is one.
        strays: Names the files of a listing that are not used; see `strays.strays`.
    """

    word: str
    is_one: Callable[[Path], bool]
    strays: Callable[[Path, list[Path], Collection[Path]], list[Problem]]


def is_picture(path: Path) -> bool:
    """Tell by the ending, or else by the content, whether a file is a picture to try."""
    if is_hidden(path) or not os.path.isfile(path):
        return False
    return path.suffix.lower() in ENDINGS or has_picture_inside(path)


PICTURES = Kind("picture", is_picture, strays)


def find_pictures(
    folder: Path, recurse: bool = False, kind: Kind = PICTURES
) -> tuple[list[PictureFile], list[Problem]]:
    """List the pictures of a folder with their captions, in natural order of their names.

    Pictures lie in the folder itself, in folders such as `10_name` in it (ten repeats, and `name` as
    caption), in all folders in it if asked, or where one of its tables says. The chosen folder may
    have such a name itself. Captions come from a text file beside the picture, before the tables of
    its folder and of the chosen one, before the folder's name.

    Args:
        folder: An existing folder. Nothing outside of it is read, whatever links or tables say.
        recurse: Take pictures of all folders in it.
        kind: What is looked for instead of pictures.

    Returns:
        The pictures, and what lies there beside them and is not used, or not wholly, with the reason.
    """
    root = folder.resolve()
    table, problems = read_tables(folder, root)
    found: dict[str, PictureFile] = {}
    for place in _places(folder, recurse, problems):
        _take_in(kind, place, folder, root, table, found, problems)
    for name in table:
        path = folder / name
        if name not in found and kind.is_one(path):
            place = _Place(path.parent, 1, "", [path], is_whole=False)
            _take_in(kind, place, folder, root, table, found, problems)
    if not recurse:
        problems += _left_out(kind, folder, found)
    seen = found.keys() | {problem.name for problem in problems}
    problems += [
        Problem(name, f"named in {source}, but there is no such {kind.word}")
        for name, (_, source) in table.items()
        if name not in seen
    ]
    return sorted(found.values(), key=lambda file: natural(file.name)), problems


@dataclass(frozen=True)
class _Place:
    """A folder of pictures, how often they come, and the caption its name stands for."""

    path: Path
    repeats: int
    label: str
    listing: list[Path]
    is_whole: bool = True


def _take_in(
    kind: Kind,
    place: _Place,
    folder: Path,
    root: Path,
    table: dict,
    found: dict,
    problems: list[Problem],
) -> None:
    """Add a place's pictures with their captions, and say what else is there."""
    if not place.path.resolve().is_relative_to(root):
        name = place.path.relative_to(folder).as_posix()
        problems.append(Problem(name, "a link that leads out of the folder"))
        return
    pictures = [path for path in place.listing if kind.is_one(path)]
    beside = CaptionFiles(place.path, root)
    own: dict[str, tuple[tuple[str, ...], str]] = {}
    if place.path != folder and place.is_whole:
        own, more = read_tables(place.path, root)
        below = place.path.relative_to(folder).as_posix()
        problems += [Problem(f"{below}/{problem.name}", problem.reason) for problem in more]
    for path in pictures:
        name = path.relative_to(folder).as_posix()
        if not path.resolve().is_relative_to(root):
            problems.append(Problem(name, "a link that leads out of the folder"))
            continue
        try:
            lines, source, note = beside.of(path)
        except (OSError, ValueError) as error:
            problems.append(Problem(name, f"its caption cannot be read: {error}"))
            continue
        if note:
            problems.append(Problem(name, note, is_note=True))
        if not lines:
            lines, source = own.get(path.name) or table.get(name) or ((), "")
        if not lines and place.label:
            lines, source = (place.label,), "folder name"
        found[name] = PictureFile(path, name, lines, source, place.repeats)
    if place.is_whole:
        problems += kind.strays(folder, place.listing, pictures)


def describe_files(folder: Path) -> list[tuple]:
    """Describe every file, such that any change to one changes the result."""
    facts: list[tuple] = []
    for path in [folder, *folder.rglob("*")]:
        if is_hidden(path):
            continue
        name = path.relative_to(folder).as_posix()
        try:
            status = path.stat()
        except OSError:
            facts.append((name, "unreadable"))
            continue
        facts.append((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return sorted(facts)


def _places(folder: Path, recurse: bool, problems: list[Problem]) -> Iterator[_Place]:
    """Yield the folders whose pictures are taken; name the others."""
    listing = _listed(folder, folder, problems)
    match = REPEATS.fullmatch(folder.name)
    repeats, label = _meaning(match) if match and 0 < int(match[1]) <= MOST_REPEATS else (1, "")
    yield _Place(folder, repeats, label, listing)
    for path in listing:
        if not path.is_dir() or is_hidden(path):
            continue
        match = REPEATS.fullmatch(path.name)
        if match and not 0 < int(match[1]) <= MOST_REPEATS:
            reason = (
                f"its name asks for {int(match[1])} repeats, so it is left out; rename the folder"
            )
            problems.append(Problem(path.relative_to(folder).as_posix(), reason))
        elif match:
            yield _Place(path, *_meaning(match), _listed(path, folder, problems))
        elif path.is_symlink():
            problems.append(Problem(path.name, "a link to a folder, which is not followed"))
        elif recurse:
            yield from _below(path, folder, problems)


def _left_out(kind: Kind, folder: Path, found: Mapping[str, PictureFile]) -> Iterator[Problem]:
    """Name the plain folders in a folder whose pictures are not taken."""
    for path in _listed(folder, folder, []):
        is_plain = path.is_dir() and not path.is_symlink() and not is_hidden(path)
        if is_plain and not REPEATS.fullmatch(path.name) and not kind.is_one(path):
            name = path.relative_to(folder).as_posix()
            inside = (
                Path(parent, entry)
                for parent, folders, files in os.walk(path)
                for entry in (*folders, *files)
            )
            count = sum(
                kind.is_one(file) and file.relative_to(folder).as_posix() not in found
                for file in inside
            )
            if count:
                reason = f"{kind.word}s in it are not taken ({count}); turn subfolders on, or choose it itself"
                yield Problem(name, reason)


def _below(path: Path, folder: Path, problems: list[Problem]) -> Iterator[_Place]:
    listing = _listed(path, folder, problems)
    yield _Place(path, 1, "", listing)
    for inner in listing:
        if inner.is_dir() and not inner.is_symlink() and not is_hidden(inner):
            match = REPEATS.fullmatch(inner.name)
            if match and 0 < int(match[1]) <= MOST_REPEATS:
                yield _Place(inner, *_meaning(match), _listed(inner, folder, problems))
            else:
                yield from _below(inner, folder, problems)


def _meaning(match: re.Match) -> tuple[int, str]:
    """Return the repeats and the caption that a name such as `10_sks dog` stands for."""
    return int(match[1]), match[2].replace("_", " ").strip()


def _listed(path: Path, folder: Path, problems: list[Problem]) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError as error:
        problems.append(Problem(path.relative_to(folder).as_posix(), f"cannot be read: {error}"))
        return []


def natural(name: str) -> list:
    """Sort key by which picture2 comes before picture10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.casefold())
        for part in re.split(r"(\d+)", name)
    ] + [(2, 0, name)]
