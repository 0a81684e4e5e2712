"""Writes what the runs found: tables, plots, and every figure as JSON."""

import json
import statistics

from . import curves
from .plan import REFERENCE, REFERENCES, kind
from .plot import draw, draw_rows
from .sections import costing_section, looks_section, merging_section, zeroing_section

SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)  # of the most that the reference learns, in the tables
TITLE = "# What each method learns and forgets"
BEGIN, END = "<!-- figures: made by python dev.py evidence -->", "<!-- end -->"


def settings_table(runs):
    """Lines of every setting at full strength, means over seeds."""
    start = curves.starts(runs)
    has_relatives = all("relatives" in losses for losses in start.values())
    head = ["method", "trained", "rate", "seeds", "learned: not shown", "shown", "forgotten"]
    head += ["of its relatives"] if has_relatives else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    groups = {}
    for run in runs:
        if run["method"] != "none":
            groups.setdefault((run["name"], run["rate"]), []).append(run)
    for (name, rate), group in groups.items():
        ends = [run["losses"]["1.0"] for run in group]
        begun = [start[run["seed"]] for run in group]
        cells = [f"{statistics.mean(end[what] for end in ends):.4f}" for what in ("new", "shown")]
        cells.append(_growth(map(curves.forgotten, begun), map(curves.forgotten, ends)))
        if has_relatives:
            cells.append(_growth((b["relatives"] for b in begun), (e["relatives"] for e in ends)))
        trained = f"{group[0]['trained'] / 1e6:.2f} M"
        lines.append(f"| {name} | {trained} | {rate:g} | {len(group)} | {' | '.join(cells)} |")
    return lines


def _growth(before, after):
    return f"{statistics.mean(b / a - 1 for a, b in zip(before, after, strict=True)):+.0%}"


def methods_table(runs, reference):
    """Lines of the methods at equal forgetting, each at its best rate and strength there."""
    new, shown = curves.curves_of(runs), curves.curves_of(runs, "shown")
    base = curves.loss_of_base(runs)
    columns = curves.levels_of(new[reference], SHARES)
    every = curves.levels_of(new[reference])
    head = " | ".join(f"{level / base:+.0%}" for level in columns)
    lines = [
        f"| method | seeds | {head} | ahead of {reference} | shown | forgets for as much | best rate |",
        "|---" * (6 + len(columns)) + "|",
    ]
    for name, seeds in new.items():
        cells = [_mean_at(seeds, level) for level in columns]
        found = [str(len(seeds)), *cells]
        for by_name in (new, shown):
            shares = curves.advantage(by_name[name], by_name[reference], every)
            found.append(_told(shares.values()) if name != reference else "")
        found.append(curves.forgets(seeds, new[reference]) if name != reference else "")
        tried = {run["rate"] for run in runs if run["name"] == name}
        found.append(_best_rate(seeds, columns[SHARES.index(curves.MIDDLE)], tried))
        lines.append(f"| {name} | {' | '.join(found)} |")
    return lines


def _mean_at(seeds, level):
    return f"{statistics.mean(curves.learned_at(c, level)[1] for c in seeds.values()):.4f}"


def _told(shares):
    """The mean over seeds with its interval, or with both values where there are two."""
    shares = list(shares)
    if not shares:
        return ""
    told = f"{statistics.mean(shares):+.1%}"
    if len(shares) > 2:
        return f"{told} ± {100 * curves.half_width(shares):.1f}"
    return told if len(shares) == 1 else f"{told} ({', '.join(f'{s:+.1%}' for s in shares)})"


def _best_rate(seeds, level, tried):
    """The rate that is best in the middle of the table; whether it is the first or last that was tried."""
    rate = statistics.mode(curves.learned_at(curve, level)[2] for curve in seeds.values())
    edge = "lowest" if rate == min(tried) else "highest" if rate == max(tried) else None
    return f"{rate:g}" + (f", the {edge} tried" if edge and len(tried) > 1 else "")


def section(title, runs, picture):
    """Lines on the runs of one question."""
    plan, reference = runs[0], REFERENCES.get(title, REFERENCE)
    return [
        f"## {title}",
        "",
        f"{plan['base']}, {plan['pictures']} pictures in the style {plan['style']}, {plan['steps']} steps "
        f"of batch {plan['batch']}.",
        "",
        f"![beside {reference} at equal forgetting]({picture})",
        "",
        *methods_table(runs, reference),
        "",
        "At full strength:",
        "",
        *settings_table(runs),
        "",
    ]


HOW_TO_READ = f"""\
Loss in the model's own prediction, lower is better. Noise and order of the pictures are the same for all methods
with one seed. Made by `python dev.py evidence`.

In the first table of a question each method is at its best rate and strength for what it may forget. The
columns in per cent tell by how much the loss on the base's own styles has grown: where {REFERENCE}, or what else is
named as the reference, has learned {", ".join(f"{share:.0%}" for share in SHARES[:-1])} and all of the most it learns. In them is the
loss on concepts of the new style that were not shown, mean over seeds. *Ahead* is how much lower that loss is than the
reference's, mean over {len(curves.LEARNED)} such amounts of forgetting from {curves.LEARNED[0]:.0%} on: with three seeds or more ± half of the 90 % interval
by Student's distribution, with two both values, with one that alone. *Shown* is the same on the pictures that were
trained on. *Forgets for as much* is how much more a method forgets where its loss is as low as the
reference's at {curves.MIDDLE:.0%}. *Best rate* is that in the column of {curves.MIDDLE:.0%}.
"""


def slug(title):
    """A title as a part of a file's name."""
    return "_".join("".join(c for c in title.lower() if c.isalnum() or c == " ").split())


def write(questions, runs, out, rows=None, left=None):
    """Write evidence.json, evidence.md and a picture for each question into a folder.

    What was written by hand stays: only what lies between the marks is made anew.

    Args:
        questions: Runs by title.
        runs: All that were done, also of questions that cannot be answered yet.
        out: The folder.
        rows: Files of the pictures made by runs of a title, if they made any.
        left: How many runs of a title are still to be made.
    """
    rows, left = rows or {}, left or {}
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "evidence.json").write_text(json.dumps(runs, indent=1) + "\n")
    text = [HOW_TO_READ]
    for title, found in questions.items():
        picture = f"images/evidence_{slug(title)}.png"
        if title in rows:
            if all(file.is_file() for file in rows[title]):  # else the picture there stays
                draw_rows(rows[title], [run["name"] for run in found]).save(out / picture)
            text += looks_section(title, found, picture)
        elif kind(found[0]) == "merging":
            text += merging_section(title, found)
        elif kind(found[0]) == "zeroing":
            text += zeroing_section(title, found)
        elif kind(found[0]) == "costing":
            text += costing_section(title, found, runs)
        else:
            by_name, reference = curves.curves_of(found), REFERENCES.get(title, REFERENCE)
            draw(by_name, reference, curves.loss_of_base(found)).save(out / picture)
            text += section(title, found, picture)
        if left.get(title):
            text += [f"{left[title]} runs of this question are still to be made.", ""]
    file = out / "evidence.md"
    before = file.read_text() if file.is_file() else f"{TITLE}\n\n{BEGIN}\n{END}\n"
    above, below = before.split(BEGIN)[0], before.split(END)[1]
    file.write_text("\n".join([above + BEGIN, *text]) + END + below)
