"""Find the pictures of a folder and their captions, as people and older trainers lay them out."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ENDINGS = frozenset(
    ".png .jpg .jpeg .jpe .jfif .mpo .webp .bmp .tif .tiff .gif .avif .heic .heif".split()
)
CAPTION_ENDINGS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "captions.json")
NAME_KEYS, TEXT_KEYS = ("file_name", "image", "image_path", "file"), ("text", "caption", "prompt")
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


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, or not wholly, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


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
    table, problems = _read_tables(folder, root)
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
            caption, source = _caption_beside(path, root, beside)
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
    facts = []
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


def with_trigger(caption: str, trigger: str) -> str:
    """Put a trigger before a caption that does not hold it yet, as words of its own."""
    trigger = trigger.strip()
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


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


def _caption_beside(picture: Path, root: Path, beside: dict) -> tuple[str | None, str]:
    """Read the text file of a picture's name; `beside` remembers such files by folder."""
    parent = picture.parent
    if parent not in beside:
        beside[parent] = {
            path.stem.casefold() + path.suffix.lower(): path
            for path in sorted(parent.iterdir(), reverse=True)
            if path.suffix.lower() in CAPTION_ENDINGS
        }
    for ending in CAPTION_ENDINGS:
        for stem in (picture.stem, picture.name):
            path = beside[parent].get(stem.casefold() + ending)
            if path is not None:
                if not path.resolve().is_relative_to(root):
                    raise ValueError(f"{path.name} is a link that leads out of the folder")
                return _one_line(_read_text(path)), ending
    return None, ""


def _read_tables(folder: Path, root: Path) -> tuple[dict[str, tuple[str, str]], list[Problem]]:
    """Read metadata.jsonl and captions.json into captions by name below the folder."""
    table: dict[str, tuple[str, str]] = {}
    problems = []
    for file in reversed(TABLES):  # the first one wins
        path = folder / file
        if not os.path.isfile(path):
            continue
        try:
            if not path.resolve().is_relative_to(root):
                raise ValueError("a link that leads out of the folder")
            rows = list(_rows(_read_text(path), file))
        except (OSError, ValueError, RecursionError) as error:
            problems.append(Problem(file, f"cannot be read: {error}"))
            continue
        for where, row in rows:
            entry = _entry(row)
            if entry is None:
                problems.append(
                    Problem(file, f"{where} has no file_name and text of a picture in the folder")
                )
            else:
                table[entry[0]] = (_one_line(entry[1]), file)
    return table, problems


def _rows(text: str, file: str) -> Iterator[tuple[str, object]]:
    """Yield where each entry of a table is, and the entry."""
    if file.endswith(".jsonl"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except ValueError:
                    yield f"line {number}", None
        return
    data = json.loads(text)
    if isinstance(data, dict):
        for name, value in data.items():
            row = {**value, "file_name": name} if isinstance(value, dict) else value
            yield repr(name), row if isinstance(row, dict) else {"file_name": name, "text": row}
    else:
        for number, row in enumerate(data if isinstance(data, list) else [data], 1):
            yield f"entry {number}", row


def _entry(row: object) -> tuple[str, str] | None:
    if not isinstance(row, dict):
        return None
    name = next((row[key] for key in NAME_KEYS if isinstance(row.get(key), str)), None)
    text = next((row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)), None)
    if name is None or text is None or "\0" in name:
        return None
    path = PurePosixPath(name.replace("\\", "/"))
    leads_out = path.is_absolute() or ".." in path.parts or ":" in name
    return None if leads_out or not path.parts else (path.as_posix(), text)


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not in UTF-8; save it as UTF-8") from error


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _natural(name: str) -> list:
    """Sort key by which picture2 comes before picture10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.casefold())
        for part in re.split(r"(\d+)", name)
    ] + [(2, 0, name)]
