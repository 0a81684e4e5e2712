"""Text files of captions, in the encodings people's editors leave."""

import codecs
from pathlib import Path

MARKS = (  # a longer one before one it begins with
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
# What Western text has beside ASCII and accented letters; other bytes speak for another encoding.
WESTERN = frozenset("‘’“”–—…•°€£§©®«»¿¡´·ŒœŠšŽžŸ\xa0½¼¾²³ªº×")


def read_text(path: Path) -> tuple[str, str]:
    """Read a text file.

    Returns:
        Its text, and the name of its encoding if that was guessed; else empty.

    Raises:
        ValueError: It is text of an encoding that cannot be told.
        OSError: It cannot be read.
    """
    data = path.read_bytes()
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return _decoded(data, encoding, path), ""
    if b"\0" in data:
        encoding = _wide_encoding(data)
        text = _decoded(data, encoding, path)
        if 2 * sum(map(str.isascii, text)) < len(text) or any(map(_is_control, text)):
            raise _unknown(path)  # only mostly Latin text can be told by its zero bytes
        return text, encoding
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError:
        return _western(data, path), "cp1252"


def _decoded(data: bytes, encoding: str, path: Path) -> str:
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _unknown(path) from error
    if "\0" in text:
        raise _unknown(path)
    return text


def _wide_encoding(data: bytes) -> str:
    """Tell by where the zero bytes of mostly Latin text are."""
    zeros = [data[place::4].count(0) for place in range(4)]
    quarter = max(1, len(data) // 4)
    if len(data) % 4 == 0 and min(zeros[1:]) > 0.9 * quarter:
        return "utf-32-le"
    if len(data) % 4 == 0 and min(zeros[:3]) > 0.9 * quarter:
        return "utf-32-be"
    return "utf-16-le" if zeros[1] + zeros[3] > zeros[0] + zeros[2] else "utf-16-be"


def _western(data: bytes, path: Path) -> str:
    """Read cp1252, unless the text is more likely in an encoding of another script.

    Those put characters of two bytes side by side, which would be runs of odd letters here.
    """
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError as error:
        raise _unknown(path) from error
    odd = [not one.isascii() for one in text]
    is_run = any(one and two for one, two in zip(odd, odd[1:], strict=False))
    is_western = all(
        one.isascii() or one in WESTERN or ("À" <= one <= "ÿ" and one != "÷") for one in text
    )
    if is_run or not is_western or any(map(_is_control, text)):
        raise _unknown(path)
    return text


def _is_control(character: str) -> bool:
    return character < " " and character not in "\t\r\n"


def _unknown(path: Path) -> ValueError:
    return ValueError(f"{path.name} is not in UTF-8; save it as UTF-8")
