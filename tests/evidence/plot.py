"""Curves of what was learned against what was forgotten."""

from PIL import Image, ImageDraw, ImageFont

from . import curves

COLORS = ("#e8743b", "#5b8db8", "#6a9f58", "#967bb6", "#c2447a", "#8c6d31", "#3aa6a6", "#555555",
          "#b0b03a", "#d9a0c0", "#2f4f7f", "#a05030", "#80c0e0", "#405020", "#909090")  # fmt: skip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1100, 620, 70, 320, 30, 60
INK, GRID = "#222222", "#dddddd"


def averaged(seeds):
    """Means of a method's curves over seeds, at levels that all of them reach."""
    low, high = curves.common_range({"": seeds})
    every = [curves.best(spots) for spots in seeds.values()]
    found = []
    for level in curves.levels_between(low, high):
        losses = [curves.learned_at(curve, level) for curve in every]
        if None not in losses:
            found.append((level, sum(losses) / len(losses)))
    return found


def draw(by_name):
    """Picture of the curves: forgotten to the right, learned downwards."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    lines = {name: averaged(seeds) for name, seeds in by_name.items()}
    every = [spot for line in lines.values() for spot in line]
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*every, strict=True))
    right, low = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(grown, new):
        x = LEFT + (grown - x0) / ((x1 - x0) or 1) * (right - LEFT)
        return x, TOP + (y1 - new) / ((y1 - y0) or 1) * (low - TOP)

    for share in (0, 0.25, 0.5, 0.75, 1):
        grown, new = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        x, y = place(grown, new)
        pen.line([x, TOP, x, low], fill=GRID)
        pen.line([LEFT, y, right, y], fill=GRID)
        pen.text((x - 18, low + 6), f"{grown:.3f}", INK, font)
        pen.text((12, y - 8), f"{new:.3f}", INK, font)
    for number, (name, line) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        pen.line([place(*spot) for spot in line], fill=color, width=3)
        pen.text((right + 15, TOP + 22 * number), name, color, font)
    pen.text((LEFT, HEIGHT - 26), "forgotten: growth of the loss on the base's styles", INK, font)
    pen.text((LEFT, 6), "loss on concepts of the new style that were not shown", INK, font)
    return image
