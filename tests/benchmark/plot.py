"""A picture of the benchmark: peak memory and time of every method, beside the floors."""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, BAR, LABELS, GAP = 1100, 26, 210, 60
INK, GRID, OURS, OTHERS, FLOORS = "#222222", "#dddddd", "#e8743b", "#5b8db8", "#9aa5ad"


def color_of(method):
    if method.startswith("floor"):
        return FLOORS
    return OURS if method.startswith("sara") else OTHERS


def bars(draw, font, rows, left, right, title, value, text):
    """Draw one panel of horizontal bars between two x positions."""
    draw.text((left, 14), title, fill=INK, font=font)
    largest = max(map(value, rows))
    for number, row in enumerate(rows):
        top = 46 + number * BAR
        width = (right - left - 70) * value(row) / largest
        draw.rectangle([left, top, left + width, top + BAR - 7], fill=color_of(row["method"]))
        draw.text((left + width + 6, top), text(row), fill=INK, font=font)


def draw_benchmark(rows):
    """Draw the rows in their order. Returns a picture."""
    image = Image.new("RGB", (WIDTH, 60 + BAR * len(rows)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for number, row in enumerate(rows):
        draw.text((10, 46 + number * BAR), row["method"], fill=INK, font=font)
    half = (WIDTH - LABELS - GAP) // 2
    bars(draw, font, rows, LABELS, LABELS + half, "peak memory",
         lambda r: r["peak_bytes"], lambda r: f"{r['peak_bytes'] / 1e9:.1f} GB")  # fmt: skip
    bars(draw, font, rows, LABELS + half + GAP, WIDTH, "time of a step, x dense backward",
         lambda r: r["step_ratio"], lambda r: f"{r['step_ratio']:.2f}")  # fmt: skip
    return image


if __name__ == "__main__":  # from the figures of an earlier run
    source = Path(sys.argv[1])
    draw_benchmark(json.loads(source.read_text())["rows"]).save(sys.argv[2])
