"""Captions: beside the pictures or in a table, in the forms other trainers write them."""

import json
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

CAPTION_ENDINGS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "captions.json")
NAME_KEYS, TEXT_KEYS = ("file_name", "image", "image_path", "file"), ("text", "caption", "prompt")


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, or not wholly, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def with_trigger(caption: str, trigger: str) -> str:
    """Put a trigger before a caption that does not hold it yet, as words of its own."""
    trigger = trigger.strip()
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def caption_beside(picture: Path, root: Path, beside: dict) -> tuple[str | None, str]:
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


def read_tables(folder: Path, root: Path) -> tuple[dict[str, tuple[str, str]], list[Problem]]:
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
            listed[parent] = {_folded(one): one for one in names} | {one: one for one in names}
        others = listed[parent]
        found = others.get(path.name) or others.get(_folded(path.name)) or path.name
        if found == path.name:
            spelled[name] = value
        else:
            spelled.setdefault(str(path.with_name(found)), value)
    return spelled


def _folded(name: str) -> str:
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
