"""Pictures of the report: curves, and rows of pictures."""

from PIL import Image, ImageDraw, ImageFont

from . import curves

COLORS = ("#e8743b", "#5b8db8", "#6a9f58", "#967bb6", "#c2447a", "#8c6d31", "#3aa6a6", "#555555",
          "#b0b03a", "#d9a0c0", "#2f4f7f", "#a05030", "#80c0e0", "#405020", "#909090")  # fmt: skip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1100, 620, 70, 320, 30, 60
LABELS = 110
SHOWN = (-10, 25)  # percent
INK, GRID = "#222222", "#dddddd"


def averaged(seeds):
    """Means of a method's curves over seeds, at levels that all of them reach."""
    low, high = curves.common_range({"": seeds})
    every = [curves.best(spots) for spots in seeds.values()]
    found = []
    for level in curves.levels_between(low, high) if low < high else [low]:
        losses = [curves.learned_at(curve, level) for curve in every]
        if None not in losses:
            found.append((level, sum(losses) / len(losses)))
    return found


def beside(lines, rival):
    """How much larger each loss is than the best rival's at equal forgetting, in percent, where there is one."""
    rivals = [line for name, line in lines.items() if line and name.startswith(rival)]
    found = {}
    for name, line in lines.items():
        found[name] = []
        for level, loss in line:
            others = [curves.learned_at(other, level) for other in rivals]
            others = [other for other in others if other is not None]
            if others:
                found[name].append((level, 100 * (loss / min(others) - 1)))
    return {name: line for name, line in found.items() if line}


def draw(by_name, rival):
    """Picture of how far the methods are from the best of the rivals, at equal forgetting.

    Args:
        by_name: As `curves.points` returns it.
        rival: How names of the rivals begin.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    lines = beside({name: averaged(seeds) for name, seeds in by_name.items()}, rival)
    levels = [level for line in lines.values() for level, _ in line]
    (x0, x1), (y0, y1) = (min(levels, default=0), max(levels, default=1)), SHOWN
    right, low = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(grown, more):
        x = LEFT + (grown - x0) / ((x1 - x0) or 1) * (right - LEFT)
        return x, TOP + (min(more, y1) - y0) / (y1 - y0) * (low - TOP)

    for share in (0, 0.25, 0.5, 0.75, 1):
        x, _ = place(x0 + share * (x1 - x0), 0)
        pen.line([x, TOP, x, low], fill=GRID)
        pen.text((x - 18, low + 6), f"{x0 + share * (x1 - x0):.3f}", INK, font)
    for more in range(y0, y1 + 1, 5):
        _, y = place(x0, more)
        pen.line([LEFT, y, right, y], fill=GRID if more else INK)
        pen.text((20, y - 8), f"{more:+d} %", INK, font)
    for number, (name, line) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        pen.line([place(*spot) for spot in line], fill=color, width=3)
        pen.text((right + 15, TOP + 22 * number), name, color, font)
    pen.text((LEFT, HEIGHT - 26), "forgotten: growth of the loss on the base's styles", INK, font)
    above = f"loss on what was not shown, beside the best {rival} that forgets as much (higher is better)"
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
