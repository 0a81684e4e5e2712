"""A picture of a training set: every entry with its size and caption."""

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..fonts import font_for
from .folder_plan import EncodedFolder, Variant

CELL, TEXT, COLUMNS = 144, 62, 10
MAX_CELLS = 120
INK, FAINT, FRAME, SKIPPED = "#222222", "#888888", "#dddddd", "#c0392b"


def contact_sheet(folder: EncodedFolder, variants: list[Variant]) -> Tensor:
    """Draw the entries by size, up to MAX_CELLS. Returns an IMAGE, `(1, H, W, 3)` in `[0, 1]`.

    Args:
        folder: Holds thumbnails and captions.
        variants: The entries to draw; each once.
    """
    shown = sorted(variants, key=lambda v: (-v.size[0] / v.size[1], v.size, v.file.name))
    more = len(shown) - MAX_CELLS
    shown = shown[:MAX_CELLS]
    columns = min(COLUMNS, max(4, len(shown)))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * CELL + 8, rows * (CELL + TEXT) + 30), "white")
    draw, font = ImageDraw.Draw(sheet), font_for("".join(folder.texts.values()), 11)
    for number, variant in enumerate(shown):
        x, y = 8 + number % columns * CELL, 8 + number // columns * (CELL + TEXT)
        _draw_entry(sheet, draw, font, (x, y), folder, variant)
    notes = [f"left out or incomplete: {len(folder.problems)}"] if folder.problems else []
    notes += [f"further entries: {more}"] if more > 0 else []
    draw.text((8, sheet.height - 20), ", ".join(notes), fill=SKIPPED, font=font)
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


def _draw_entry(sheet, draw, font, corner: tuple[int, int], folder, variant: Variant) -> None:
    encoding = folder.encodings[variant.key]
    x, y = corner
    thumbnail = Image.fromarray(encoding["thumbnail"].numpy())
    size = thumbnail.size
    top = y + (CELL - 16 - size[1]) // 2
    sheet.paste(thumbnail, (x, top))
    draw.rectangle([x - 1, top - 1, x + size[0], top + size[1]], outline=FRAME)
    marks = ["x".join(map(str, variant.shape))]
    marks += [f"x{variant.file.repeats}"] if variant.file.repeats > 1 else []
    marks += ["mirrored"] if variant.mirrored else []
    marks += ["mask"] if encoding["mask"] is not None else []
    draw.text((x, y + CELL - 14), " ".join(marks), fill=FAINT, font=font)
    lines = textwrap.wrap(folder.texts[variant.file.name] or "(no caption)", 24)
    if len(lines) > 4:
        lines[3:] = [lines[3][:22] + "..."]
    for number, line in enumerate(lines):
        draw.text((x, y + CELL + 13 * number), line, fill=INK, font=font)
