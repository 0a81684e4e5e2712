"""Writes what the runs found: tables, a plot, and every figure as JSON."""

import json
import statistics
from collections import defaultdict

from PIL import Image, ImageDraw, ImageFont

from ..emoji64.pictures import BASE_STYLES

COLORS = ("#e8743b", "#5b8db8", "#6a9f58", "#967bb6", "#c2447a", "#8c6d31", "#3aa6a6", "#555555")
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 900, 560, 70, 190, 50
INK, GRID = "#222222", "#dddddd"


def forgotten(losses):
    """Mean loss on the styles of the base."""
    return statistics.mean(losses[style] for style in BASE_STYLES)


def points(runs):
    """Means over seeds of forgotten, learned and shown, by method, rate and strength.

    Forgotten is how much the loss on the base's own styles has grown; learned the loss on concepts of the
    new style that were not shown (lower is more), and shown that on those that were.
    """
    start = {run["seed"]: run["losses"]["0"] for run in runs if run["method"] == "none"}
    found = defaultdict(list)
    for run in runs:
        for strength, losses in run["losses"].items() if run["method"] != "none" else ():
            grown = forgotten(losses) - forgotten(start[run["seed"]])
            place = run["name"], run["rate"], float(strength)
            found[place].append((grown, losses["new"], losses["shown"]))
    return {
        place: [statistics.mean(values) for values in zip(*seeds, strict=True)]
        for place, seeds in found.items()
    }


def best(curve):
    """The points of a method that none of its others beats in both, by what is forgotten."""
    kept = []
    for grown, new in sorted(curve):
        if not kept or new < kept[-1][1]:
            kept.append((grown, new))
    return kept


def curves(found):
    """Best points of each method."""
    by_name = defaultdict(list)
    for (name, _, _), (grown, new, _) in found.items():
        by_name[name].append((grown, new))
    return {name: best(curve) for name, curve in by_name.items()}


def learned_at(curve, grown):
    """Loss in the new style at so much forgotten, on straight lines between points; None outside them."""
    for (x0, y0), (x1, y1) in zip(curve[:-1], curve[1:], strict=True):
        if x0 <= grown <= x1:
            return y0 + (y1 - y0) * (grown - x0) / (x1 - x0)
    return None


def draw(by_name):
    """Picture of the curves: forgotten to the right, learned downwards."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    every = [point for curve in by_name.values() for point in curve]
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*every, strict=True))
    right, low = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(grown, new):
        x = LEFT + (grown - x0) / ((x1 - x0) or 1) * (right - LEFT)
        return x, 20 + (y1 - new) / ((y1 - y0) or 1) * (low - 20)

    for share in (0, 0.25, 0.5, 0.75, 1):
        grown, new = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        x, y = place(grown, new)
        pen.line([x, 20, x, low], fill=GRID)
        pen.line([LEFT, y, right, y], fill=GRID)
        pen.text((x - 18, low + 6), f"{grown:.3f}", INK, font)
        pen.text((12, y - 8), f"{new:.3f}", INK, font)
    for number, (name, curve) in enumerate(by_name.items()):
        color = COLORS[number % len(COLORS)]
        spots = [place(*point) for point in curve]
        pen.line(spots, fill=color, width=3)
        for x, y in spots:
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=color)
        pen.text((right + 15, 30 + 24 * number), name, color, font)
    pen.text((LEFT, HEIGHT - 22), "forgotten: growth of the loss on the base's styles", INK, font)
    pen.text((LEFT, 2), "loss on concepts of the new style that were not shown", INK, font)
    return image


def settings_table(runs, found):
    """Lines of every setting, at full strength."""
    trained = {run["name"]: run.get("trained", 0) for run in runs}
    lines = [
        "| method | trained | rate | learned: not shown | shown | forgotten |",
        "|---|---|---|---|---|---|",
    ]
    for (name, rate, strength), (grown, new, shown) in found.items():
        if strength == 1:
            size = f"{trained[name] / 1e6:.2f} M"
            lines.append(f"| {name} | {size} | {rate:g} | {new:.4f} | {shown:.4f} | {grown:.4f} |")
    return lines


def methods_table(by_name):
    """Lines of the methods at equal forgetting, up to what all of them reach."""
    most = min(curve[-1][0] for curve in by_name.values())
    levels = [most * share for share in (0.25, 0.5, 0.75, 1)]
    lines = ["| method | " + " | ".join(f"{level:.4f}" for level in levels) + " |"]
    lines.append("|---" * (1 + len(levels)) + "|")
    for name, curve in by_name.items():
        losses = [learned_at(curve, level) for level in levels]
        cells = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write(runs, out):
    """Write evidence.json, evidence.md and evidence.png into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "evidence.json").write_text(json.dumps(runs, indent=1) + "\n")
    found = points(runs)
    by_name = curves(found)
    draw(by_name).save(out / "evidence.png")
    plan, seeds = runs[0], {run["seed"] for run in runs}
    text = [
        "# What each method learns and forgets",
        "",
        f"{plan['base']}, {plan['pictures']} pictures in the style {plan['style']}, {plan['steps']} steps "
        f"of batch {plan['batch']}; loss in the model's own prediction, means over {len(seeds)} seeds. "
        "Made by `python dev.py evidence`.",
        "",
        "![learned against forgotten](evidence.png)",
        "",
        "At equal forgetting, with the best rate and strength of each:",
        "",
        *methods_table(by_name),
        "",
        "At full strength:",
        "",
        *settings_table(runs, found),
        "",
    ]
    (out / "evidence.md").write_text("\n".join(text))
