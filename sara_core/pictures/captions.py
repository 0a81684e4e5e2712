"""Captions: beside the pictures or in a table, in the forms other trainers write them."""

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .caption_text import read_text

CAPTION_ENDINGS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv", "captions.jsonl", "captions.json")  # in any case
NAME_KEYS, TEXT_KEYS = ("file_name", "image", "image_path", "file"), ("text", "caption", "prompt")


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, or not wholly, and why.

    Args:
        name: Below the folder.
        reason: Why.
        is_note: It is used all the same; this is only to be known.
    """

    name: str
    reason: str
    is_note: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def holds(caption: str, trigger: str) -> bool:
    """Tell whether a caption holds a trigger as words of its own; the empty one is in none."""
    words = re.escape(trigger.strip())
    return bool(words and re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE))


def with_trigger(caption: str, trigger: str) -> str:
    """Put a trigger before a caption that does not hold it yet, as words of its own."""
    trigger = trigger.strip()
    if not trigger or holds(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


class CaptionFiles:
    """The caption files of a folder, by the name of their picture.

    Args:
        folder: Where pictures and captions lie.
        root: Nothing outside of it is read, whatever links say.
    """

    def __init__(self, folder: Path, root: Path):
        self._root = root
        self._files = [
            path for path in sorted(folder.iterdir()) if path.suffix.lower() in CAPTION_ENDINGS
        ]
        self._exact = {path.name: path for path in self._files}
        self._cased = {path.name.casefold(): path for path in reversed(self._files)}
        self._folded = {folded(path.name): path for path in reversed(self._files)}

    def of(self, picture: Path) -> tuple[tuple[str, ...], str, str]:
        """Read the text file of a picture's name: spelled the same, or else in other case or accents.

        Returns:
            Its lines, none if there is no such file or it is empty; the ending it was found by; and a
            note on its encoding, mostly empty.

        Raises:
            ValueError: A link that leads out of the folder, or text in an unknown encoding.
            OSError: It cannot be read.
        """
        names = [f"{s}{e}" for e in CAPTION_ENDINGS for s in (picture.stem, picture.name)]
        path = next(filter(None, map(self._find, names)), None)
        if path is None:
            return (), "", ""
        if not path.resolve().is_relative_to(self._root):
            raise ValueError(f"{path.name} is a link that leads out of the folder")
        text, guessed = read_text(path)
        note = (
            f"{path.name} is taken for {guessed}; save it as UTF-8 if it looks wrong"
            if guessed
            else ""
        )
        return _lines(text), path.suffix.lower(), note

    def _find(self, name: str) -> Path | None:
        return (
            self._exact.get(name)
            or self._cased.get(name.casefold())
            or self._folded.get(folded(name))
        )


def read_tables(
    folder: Path, root: Path
) -> tuple[dict[str, tuple[tuple[str, ...], str]], list[Problem]]:
    """Read the tables in a folder, those of TABLES, into captions by name below the folder.

    Returns:
        Lines of each caption and the table it is from; and what is wrong.
    """
    table: dict[str, tuple[tuple[str, ...], str]] = {}
    problems = []
    names = {path.name.casefold(): path for path in sorted(folder.iterdir(), reverse=True)}
    for file in reversed(TABLES):  # the first one wins
        path = names.get(file)
        if path is None or not os.path.isfile(path):
            continue
        try:
            if not path.resolve().is_relative_to(root):
                raise ValueError("a link that leads out of the folder")
            rows = list(_rows(read_text(path)[0], file))
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            problems.append(Problem(path.name, f"cannot be read: {error}"))
            continue
        for where, row in rows:
            entry = _entry(row)
            if entry is None:
                problems.append(
                    Problem(
                        path.name, f"{where} has no file_name and text of a picture in the folder"
                    )
                )
            elif lines := _lines(entry[1]):
                table[entry[0]] = (lines, path.name)
    return _as_on_disk(table, folder), problems


def _as_on_disk(table: dict[str, tuple], folder: Path) -> dict[str, tuple]:
    """Spell names as the disk does, where only case or the form of accents differs.

    Some file systems take both spellings for the same file, which would come twice otherwise.
    """
    spelled: dict[str, tuple] = {}
    listed: dict[Path, dict[str, str]] = {}
    for name, value in table.items():
        path, parent = PurePosixPath(name), (folder / name).parent
        if parent not in listed:
            try:
                names = sorted(os.listdir(parent))
            except OSError:
                names = []
            listed[parent] = {folded(one): one for one in names} | {one: one for one in names}
        others = listed[parent]
        found = others.get(path.name) or others.get(folded(path.name)) or path.name
        if found == path.name:
            spelled[name] = value
        else:
            spelled.setdefault(str(path.with_name(found)), value)
    return spelled


def folded(name: str) -> str:
    """Return a name by which spellings in other case or form of accents are equal."""
    return unicodedata.normalize("NFC", name).casefold()


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
    if file.endswith(".csv"):
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 2):
            yield f"line {number}", {key: value for key, value in row.items() if key}
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
    texts = (_as_text(row.get(key)) for key in TEXT_KEYS)
    text = next((text for text in texts if text is not None), None)
    if name is None or text is None or "\0" in name:
        return None
    path = PurePosixPath(name.replace("\\", "/"))
    leads_out = path.is_absolute() or ".." in path.parts or ":" in name
    return None if leads_out or not path.parts else (path.as_posix(), text)


def _as_text(value: object) -> str | None:
    """Return a caption, or a list of several as its lines; None if it is something else."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return "\n".join(" ".join(one.split()) for one in value)
    return value if isinstance(value, str) else None


def _lines(text: str) -> tuple[str, ...]:
    """Return the lines of a text that are not empty, each with single spaces."""
    return tuple(line for line in (" ".join(line.split()) for line in text.splitlines()) if line)
