"""Writes what the runs found: tables, plots, and every figure as JSON."""

import json
import statistics

from . import curves
from .plan import kind
from .plot import draw, draw_rows
from .sections import costing_section, looks_section, merging_section, zeroing_section

SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of what all methods reach, where their losses are shown
TITLE = "# What each method learns and forgets"
BEGIN, END = "<!-- figures: made by python dev.py evidence -->", "<!-- end -->"
RIVAL = "LoRA"  # names of what is compared with begin so


def settings_table(runs):
    """Lines of every setting at full strength, means over seeds."""
    start = {run["seed"]: run["losses"]["0"] for run in runs if is_base(run)}
    has_relatives = all("relatives" in losses for losses in start.values())
    head = ["method", "trained", "rate", "seeds", "learned: not shown", "shown", "forgotten"]
    head += ["of its relatives"] if has_relatives else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    groups = {}
    for run in runs:
        if not is_base(run):
            groups.setdefault((run["name"], run["rate"]), []).append(run)
    for (name, rate), group in groups.items():
        ends = [run["losses"]["1.0"] for run in group]
        begun = [start[run["seed"]] for run in group]
        found = [[losses[what] for losses in ends] for what in ("new", "shown")]
        found.append(
            [curves.forgotten(e) - curves.forgotten(b) for e, b in zip(ends, begun, strict=True)]
        )
        if has_relatives:
            found.append(
                [e["relatives"] - b["relatives"] for e, b in zip(ends, begun, strict=True)]
            )
        cells = " | ".join(f"{statistics.mean(values):.4f}" for values in found)
        trained = f"{group[0]['trained'] / 1e6:.2f} M"
        lines.append(f"| {name} | {trained} | {rate:g} | {len(group)} | {cells} |")
    return lines


def is_base(run):
    """Tell whether a run is the model as it was."""
    return run["method"] == "none"


def methods_table(by_name):
    """Lines of the methods at equal forgetting, each at its best rate and strength there."""
    low, high = curves.common_range(by_name)
    levels = [low + share * (high - low) for share in SHARES]
    rivals = [seeds for name, seeds in by_name.items() if name.startswith(RIVAL)]
    every = curves.levels_between(low, high)
    head = " | ".join(f"{level:.4f}" for level in levels)
    lines = [f"| method | seeds | {head} | below {RIVAL}'s best (90 %) |"]
    lines.append("|---" * (3 + len(levels)) + "|")
    for name, seeds in by_name.items():
        cells = [_mean_at(seeds, level) for level in levels]
        shares = curves.advantage(seeds, rivals, every).values()
        found = ""
        if shares:
            least, most = curves.interval(shares)
            found = f"{statistics.mean(shares):+.1%}"
            found += f" ({least:+.1%} to {most:+.1%})" if len(shares) > 1 else ""
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} | {found} |")
    return lines


def _mean_at(seeds, level):
    losses = [curves.learned_at(curves.best(spots), level) for spots in seeds.values()]
    return "" if None in losses else f"{statistics.mean(losses):.4f}"


def section(title, runs, picture):
    """Lines on the runs of one question."""
    plan, by_name = runs[0], curves.points(runs)
    return [
        f"## {title}",
        "",
        f"{plan['base']}, {plan['pictures']} pictures in the style {plan['style']}, {plan['steps']} steps "
        f"of batch {plan['batch']}.",
        "",
        f"![beside LoRA at equal forgetting]({picture})",
        "",
        "Loss on concepts of the new style that were not shown, at equal forgetting (the growth of the loss "
        "on the base's styles); lower is better. Each method at its best rate and strength there, means "
        "over seeds. The last column is the mean over all such levels, with a bootstrap interval over seeds.",
        "",
        *methods_table(by_name),
        "",
        "At full strength:",
        "",
        *settings_table(runs),
        "",
    ]


def write(questions, runs, out, rows=None):
    """Write evidence.json, evidence.md and a picture for each question into a folder.

    What was written by hand stays: only what lies between the marks is made anew.

    Args:
        questions: Runs by title.
        runs: All that were done, also of questions that cannot be answered yet.
        out: The folder.
        rows: Files of the pictures made by runs of a title, if they made any.
    """
    rows = rows or {}
    (out / "images").mkdir(parents=True, exist_ok=True)
    (out / "evidence.json").write_text(json.dumps(runs, indent=1) + "\n")
    text = [
        "Loss in the model's own prediction. Noise and order of the pictures are the same for all methods "
        "with one seed. Made by `python dev.py evidence`.",
        "",
    ]
    for number, (title, found) in enumerate(questions.items(), 1):
        picture = f"images/evidence_{number}.png"
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
            draw(curves.points(found), RIVAL).save(out / picture)
            text += section(title, found, picture)
    file = out / "evidence.md"
    before = file.read_text() if file.is_file() else f"{TITLE}\n\n{BEGIN}\n{END}\n"
    above, below = before.split(BEGIN)[0], before.split(END)[1]
    file.write_text("\n".join([above + BEGIN, *text]) + END + below)
