"""What lies in a folder of pictures and is not used, and why."""

import os
from collections.abc import Collection
from pathlib import Path

from .captions import CAPTION_ENDINGS, TABLES, Problem, folded

LITTER = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"})  # of file managers
SIGNATURES = (  # beginnings of formats that are read, whatever the file is called
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
)
OTHER_FORMATS = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"8BPS": "Photoshop",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"DDS ": "DDS",
    b"#?RADIANCE": "Radiance HDR",
    b"<svg": "SVG",
}
OTHER_ENDINGS = {
    ".jxl": "JPEG XL", ".jp2": "JPEG 2000", ".j2k": "JPEG 2000", ".tga": "Targa", ".psd": "Photoshop",
    ".exr": "OpenEXR", ".hdr": "Radiance HDR", ".dds": "DDS", ".svg": "SVG", ".ico": "icon",
    ".dng": "raw", ".cr2": "raw", ".cr3": "raw", ".nef": "raw", ".arw": "raw", ".raf": "raw", ".orf": "raw",
    ".rw2": "raw", ".mp4": "video", ".mov": "video", ".webm": "video", ".mkv": "video", ".avi": "video",
}  # fmt: skip


def is_hidden(path: Path) -> bool:
    """Tell whether a file is none of the user's, such as macOS' `._` companions."""
    return path.name.startswith(".") or path.name.casefold() in LITTER


def has_picture_inside(path: Path) -> bool:
    """Tell by its first bytes whether a file without a picture's ending is one that can be read."""
    head = _head(path)
    return head.startswith(SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def strays(folder: Path, listing: list[Path], used: Collection[Path]) -> list[Problem]:
    """Name the files of one folder that are not used, with the reason.

    Args:
        folder: The chosen folder, for names below it.
        listing: Content of it, or of a folder in it.
        used: Pictures that are.
    """
    pictures = {folded(key) for path in used for key in (path.stem, path.name)}
    found = []
    for path in listing:
        if path in used or is_hidden(path) or path.name.casefold() in TABLES or path.is_dir():
            continue
        reason = _reason(path, pictures)
        if reason:
            found.append(Problem(path.relative_to(folder).as_posix(), reason))
    return found


def _reason(path: Path, pictures: set[str]) -> str:
    if not os.path.exists(path):
        return "a link to something that is not there"
    if not os.path.isfile(path):
        return "not a file"
    ending = path.suffix.lower()
    if ending in CAPTION_ENDINGS:
        return "" if folded(path.stem) in pictures else "a caption without a picture of its name"
    head = _head(path)
    kind = next((name for start, name in OTHER_FORMATS.items() if head.startswith(start)), None)
    kind = kind or OTHER_ENDINGS.get(ending)
    if kind == "video":
        return "a video; SaRA Video Folder reads it"
    if kind:
        return f"its format, {kind}, is not read; save it as PNG or JPEG"
    return "not a picture"


def _head(path: Path) -> bytes:
    if path.is_symlink():  # it may lead out of the folder
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(16)
    except OSError:
        return b""
