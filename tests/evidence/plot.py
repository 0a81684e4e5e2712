"""Pictures of the report: curves, and rows of pictures."""

import statistics

from PIL import Image, ImageDraw, ImageFont

from . import curves

COLORS = ("#e8743b", "#5b8db8", "#6a9f58", "#967bb6", "#c2447a", "#8c6d31", "#3aa6a6", "#555555",
          "#b0b03a", "#d9a0c0", "#2f4f7f", "#a05030", "#80c0e0", "#405020", "#909090", "#d02020", "#20a020", "#2020d0", "#000000")  # fmt: skip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1100, 620, 70, 320, 30, 60
LABELS = 110
SHOWN = (-35, 25)  # percent
TICKS = (0.25, 0.5, 0.75, 1.0)
INK, GRID = "#222222", "#dddddd"


def beside(by_name, reference):
    """How much larger each method's loss is than the reference's at equal forgetting, in percent.

    Returns:
        Lists (share of the most that the reference learns, percent), means over seeds, by name.
    """
    levels = curves.levels_of(by_name[reference])
    found = {}
    for name, seeds in by_name.items():
        shares = [curves.advantage(seeds, by_name[reference], [level]) for level in levels]
        found[name] = [
            (learned, -100 * statistics.mean(by_seed.values()))
            for learned, by_seed in zip(curves.LEARNED, shares, strict=True)
            if by_seed
        ]
    return {name: line for name, line in found.items() if line}


def draw(by_name, reference, base):
    """Picture of how far the methods are from the reference, at equal forgetting.

    Args:
        by_name: As `curves.curves_of` returns it.
        reference: Name of what they are compared with.
        base: Loss of the base on its own styles.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    (x0, x1), (y0, y1) = (curves.LEARNED[0], curves.LEARNED[-1]), SHOWN
    right, low = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(learned, more):
        x = LEFT + (learned - x0) / (x1 - x0) * (right - LEFT)
        return x, TOP + (max(min(more, y1), y0) - y0) / (y1 - y0) * (low - TOP)

    for share, level in zip(TICKS, curves.levels_of(by_name[reference], TICKS), strict=True):
        x, _ = place(share, 0)
        pen.line([x, TOP, x, low], fill=GRID)
        pen.text((x - 18, low + 6), f"{level / base:+.0%}", INK, font)
    for more in range(y0, y1 + 1, 5):
        _, y = place(x0, more)
        pen.line([LEFT, y, right, y], fill=GRID if more else INK)
        pen.text((20, y - 8), f"{more:+d} %", INK, font)
    for number, (name, line) in enumerate(beside(by_name, reference).items()):
        color = COLORS[number % len(COLORS)]
        pen.line([place(*spot) for spot in line], fill=color, width=3)
        pen.text((right + 15, TOP + 22 * number), name, color, font)
    below = f"forgotten (growth of the loss on the base's styles) where {reference} has learned 25 to 100 %"
    pen.text((LEFT, HEIGHT - 26), below, INK, font)
    above = (
        f"loss on what was not shown, beside {reference} that forgets as much (higher is better)"
    )
    pen.text((LEFT, 6), above, INK, font)
    return image


def draw_rows(files, names):
    """Picture of rows of pictures, a name before each."""
    rows = [Image.open(file) for file in files]
    width, height = rows[0].size
    image = Image.new("RGB", (LABELS + width, height * len(rows)), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        image.paste(row, (LABELS, number * height))
        pen.text((8, number * height + height // 2 - 8), name, INK, font)
    return image
