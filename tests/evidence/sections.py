"""Sections of the report that are no curves: pictures, two styles in one model, weights at zero, costs."""

import statistics

from ..emoji64 import BASE_STYLES
from . import curves
from .plan import COMMON, REFERENCE, SHARE, kind


def looks_section(title, runs, picture):
    """Lines on runs that made pictures."""
    plan, start = runs[0], curves.starts(runs)
    styles = list(plan["likeness"])
    head = " | ".join(f"{style}: distance | its concept" for style in styles)
    lines = [
        f"## {title}",
        "",
        f"{plan['base']}: *{', '.join(plan['concepts_shown'])}*, none of them shown in training.",
        "",
        f"![a row for each model]({picture})",
        "",
        "Kernel distance x 1000 to the real pictures of the style (lower is better), and the share of pictures whose "
        "nearest real one is of the concept asked for:",
        "",
        f"| model | rate | forgotten | {head} |",
        "|---" * (3 + 2 * len(styles)) + "|",
    ]
    for run in runs:
        found = [run["likeness"][style] for style in styles]
        cells = " | ".join(f"{f['distance']:.0f} | {f['top-1']:.0%}" for f in found)
        end = run["losses"].get("1.0", start[run["seed"]])
        growth = curves.forgotten(end) / curves.forgotten(start[run["seed"]]) - 1
        lines.append(f"| {run['name']} | {run['rate'] or ''} | {growth:+.0%} | {cells} |")
    return [*lines, ""]


def _mean(values, form):
    return f"{statistics.mean(values):{form}}"


def _by(runs, *keys):
    """Runs in groups that agree in some facts."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


def merging_section(title, runs):
    """Lines on two styles that were learned apart and put into one model."""
    plan, styles = runs[0], (runs[0]["style"], runs[0]["other"])
    head = " | ".join(
        f"{style}: alone | at {SHARE} | both | distance alone | at {SHARE} | both "
        f"| its concept alone | at {SHARE} | both"
        for style in styles
    )
    lines = [
        f"## {title}",
        "",
        f"{plan['base']}, {plan['pictures']} pictures in each of the styles {' and '.join(styles)}, "
        f"{plan['steps']} steps each; both changes are then added, {SHARE} of each. Loss on concepts that were not "
        "shown; kernel distance x 1000 of pictures to real ones of the style; share of pictures whose nearest real "
        "one is of the concept asked for; loss on the base's own styles with both. Means over seeds.",
        "",
        f"| method | rate | seeds | {head} | old styles, both |",
        "|---" * (4 + 9 * len(styles)) + "|",
    ]
    for (name, rate), group in _by(runs, "name", "rate").items():
        mixes = [run["mixes"] for run in group]
        names = {"alone": "{} alone", "part": f"{{}} at {SHARE}", "both": "together"}
        cells = []
        for style in styles:
            at = {
                which: [m[form.format(style) if "base" not in m else "base"] for m in mixes]
                for which, form in names.items()
            }
            cells += [_mean([m["losses"][style] for m in at[which]], ".4f") for which in names]
            for what, form in (("distance", ".0f"), ("top-1", ".0%")):
                for which in names:
                    cells.append(_mean([m["likeness"][style][what] for m in at[which]], form))
        old = [
            statistics.mean(m.get("together", m.get("base"))["losses"][s] for s in BASE_STYLES)
            for m in mixes
        ]
        cells.append(_mean(old, ".4f"))
        lines.append(f"| {name} | {rate or ''} | {len(group)} | {' | '.join(cells)} |")
    return [*lines, ""]


def zeroing_section(title, runs):
    """Lines on what bases lose where weights are set to zero."""
    shares = list(runs[0]["zeroed"])
    names = {"layer": "smallest of each layer", "random": "random", "smallest": "smallest",
             "largest": "largest"}  # fmt: skip
    lines = [
        f"## {title}",
        "",
        "Loss on the base's own styles with a share of the weights of its matrices and convolutions set to zero, "
        "without any training; means over seeds where weights are drawn.",
        "",
        f"| base | weights | {' | '.join(f'{float(share):.0%}' for share in shares)} |",
        "|---" * (2 + len(shares)) + "|",
    ]
    for (base, name), group in _by(runs, "base", "name").items():
        cells = [
            _mean([run["zeroed"][share][style] for run in group for style in BASE_STYLES], ".4f")
            for share in shares
        ]
        lines.append(f"| {base} | {names[name]} | {' | '.join(cells)} |")
    return [*lines, ""]


def costing_section(title, runs, every):
    """Lines on what methods cost, and what they forget where they have learned as much.

    Args:
        title: Of the section.
        runs: That measured costs.
        every: All runs, of which those on the same pictures tell what is learned.
    """
    lines = [
        f"## {title}",
        "",
        f"Memory is how far the peak of {COMMON['batch']} pictures a step, on one core, lies above that of the model "
        "at rest; the file is SaRA's delta, or LoRA's and full fine-tuning's weights in half precision; *forgets* "
        f"is how much more than {REFERENCE} where the loss on what was not shown is as low as {REFERENCE}'s with three "
        "quarters of what it learns at most. Means over seeds.",
        "",
    ]
    for (base,), group in _by(runs, "base").items():
        known = {**COMMON, "base": base}
        learned = [r for r in every if kind(r) == "curves" and known.items() <= r.items()]
        names = {run["name"] for run in group}
        by_name = curves.curves_of([r for r in learned if r["name"] in {*names, "base"}])
        lines += [
            f"| {base} | trained | memory | a step | file | forgets |",
            "|---" * 6 + "|",
        ]
        for run in group:
            cost, seeds = run["cost"], by_name.get(run["name"], {})
            reference = by_name.get(REFERENCE, {})
            lines.append(
                f"| {run['name']} | {run['trained'] / 1e6:.2f} M | {cost['peak_bytes'] / 1e6:.0f} MB "
                f"| {cost['step_seconds']:.2f} s | {cost['file_bytes'] / 1e6:.1f} MB "
                f"| {curves.forgets(seeds, reference)} |"
            )
        lines.append("")
    return lines
