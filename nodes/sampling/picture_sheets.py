"""Rows and sheets of sampled pictures, and the small picture a delta carries."""

import base64
import io
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..fonts import font_for

GAP, MAX_IN_ROW, THUMBNAIL = 4, 8, 256
LABEL, INK = 14, "#222222"


def row_of(pictures: Tensor) -> Image.Image:
    """Put pictures, `(n, H, W, 3)` in `[0, 1]`, side by side; of more than MAX_IN_ROW, some."""
    if len(pictures) > MAX_IN_ROW:  # a video's frames
        pictures = pictures[np.linspace(0, len(pictures) - 1, MAX_IN_ROW).round()]
    cells = [to_image(picture) for picture in pictures]
    width = sum(cell.width for cell in cells) + GAP * (len(cells) - 1)
    row = Image.new("RGB", (width, cells[0].height), "white")
    for number, cell in enumerate(cells):
        row.paste(cell, (number * (cell.width + GAP), 0))
    return row


def stack(rows: list[Image.Image]) -> Image.Image:
    """Put rows below each other."""
    height = sum(row.height for row in rows) + GAP * (len(rows) - 1)
    sheet, top = Image.new("RGB", (max(row.width for row in rows), height), "white"), 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    return sheet


def labelled_grid(
    cells: list[list[Image.Image]], columns: list[str], rows: list[str]
) -> Image.Image:
    """Draw a table of pictures with a head line and a label above each row.

    Args:
        cells: Pictures by row and column.
        columns: A label for each column.
        rows: A label for each row.
    """
    font = font_for("".join([*columns, *rows]), LABEL)
    widths = [
        math.ceil(max(font.getlength(label), *(row[i].width for row in cells)))
        for i, label in enumerate(columns)
    ]
    line, gap = LABEL + 8, 2 * GAP
    height = line + sum(line + row[0].height + gap for row in cells)
    width = max(sum(widths) + gap * (len(columns) - 1), *map(math.ceil, map(font.getlength, rows)))
    sheet = Image.new("RGB", (width + 2 * gap, height), "white")
    draw, left = (
        ImageDraw.Draw(sheet),
        [gap + sum(widths[:i]) + gap * i for i in range(len(columns))],
    )
    for label, x in zip(columns, left, strict=True):
        draw.text((x, 4), label, fill=INK, font=font)
    top = line
    for label, row in zip(rows, cells, strict=True):
        draw.text((gap, top + 4), label, fill=INK, font=font)
        for x, cell in zip(left, row, strict=True):
            sheet.paste(cell, (x, top + line))
        top += line + row[0].height + gap
    return sheet


def to_image(picture: Tensor) -> Image.Image:
    """Turn one picture, `(H, W, 3)` in `[0, 1]`, into Pillow's."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """Turn a picture into an IMAGE, `(1, H, W, 3)` in `[0, 1]`."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def thumbnail(picture: Tensor) -> str:
    """Return a picture, `(H, W, 3)` in `[0, 1]`, as a JPEG of THUMBNAIL pixels in a data URL.

    As `modelspec.thumbnail` wants it (ModelSpec 1.0.1).
    """
    image = to_image(picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
