"""What was learned against what was forgotten, compared at equal forgetting."""

import bisect
import statistics
from collections import defaultdict

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.stats import t as student

from ..emoji64 import BASE_STYLES

STEP = 0.005  # of strengths
MIDDLE = 0.75  # of the most that the reference learns
LEARNED = [0.25 + 0.05 * i for i in range(16)]  # shares of the most that the reference learns


def forgotten(losses):
    """Mean loss on the styles of the base."""
    return statistics.mean(losses[style] for style in BASE_STYLES)


def starts(runs):
    """Losses of the base by seed."""
    return {run["seed"]: run["losses"]["0"] for run in runs if run["method"] == "none"}


def loss_of_base(runs):
    """Mean loss of the base on its own styles."""
    return statistics.mean(forgotten(losses) for losses in starts(runs).values())


def curves_of(runs, what="new"):
    """The best that each method can do, by name and seed.

    Args:
        runs: Of one question, with those of the base.
        what: Name of the loss that tells what was learned: `new`, on what was not shown, or `shown`.

    Returns:
        Curves: the spots (forgotten, loss, rate) of all rates and strengths that no other beats in both, by what is
        forgotten, after that of the base. Forgotten is how much the loss on the base's own styles has grown, or 0.
        Seeds without a run of the base are left out.
    """
    start = starts(runs)
    spots = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["method"] != "none" and run["seed"] in start:
            spots[run["name"]][run["seed"]] += _path(run, start[run["seed"]], what)
    return {
        name: {seed: [(0.0, start[seed][what], 0.0), *best(found)] for seed, found in seeds.items()}
        for name, seeds in spots.items()
    }


def _path(run, start, what):
    """Spots from the base to the largest strength, by a cubic spline through those that were measured."""
    measured = {0.0: start} | {float(share): losses for share, losses in run["losses"].items()}
    strengths = sorted(measured)
    spline = CubicSpline(
        strengths,
        [(forgotten(measured[s]) - forgotten(start), measured[s][what]) for s in strengths],
    )
    fine = np.linspace(0, strengths[-1], round(strengths[-1] / STEP) + 1)
    return [(max(grown, 0.0), loss, run["rate"]) for grown, loss in spline(fine).tolist()]


def best(spots):
    """The spots that none of the others beats in both, by what is forgotten."""
    kept = []
    for spot in sorted(spots):
        if not kept or spot[1] < kept[-1][1]:
            kept.append(spot)
    return kept


def learned_at(curve, level):
    """The spot with the lowest loss of those that forget so much at most."""
    return curve[bisect.bisect_right(curve, level, key=lambda spot: spot[0]) - 1]


def forgotten_at(curve, loss):
    """Least that is forgotten where the loss is so low; None where it never is."""
    return next((spot[0] for spot in curve if spot[1] <= loss), None)


def levels_of(reference, shares=LEARNED):
    """What is forgotten where the reference has learned some shares of the most it learns; means over seeds."""
    found = []
    for share in shares:
        wanted = [(curve, loss_where_learned(curve, share)) for curve in reference.values()]
        found.append(statistics.mean(forgotten_at(curve, loss) for curve, loss in wanted))
    return found


def loss_where_learned(curve, share):
    """The loss where a share of the most that is learned has been learned."""
    first, last = curve[0][1], curve[-1][1]
    return max(last, first - share * (first - last))


def advantage(method, reference, levels):
    """How much lower a method's loss is than the reference's at equal forgetting, in seeds both have.

    Args:
        method: Curves by seed.
        reference: The same of what it is compared with.
        levels: Amounts of forgetting.

    Returns:
        Shares by seed, the mean over the levels: 0.02 is two percent lower.
    """
    found = {}
    for seed in method.keys() & reference.keys():
        pairs = [(learned_at(method[seed], x), learned_at(reference[seed], x)) for x in levels]
        found[seed] = statistics.mean(1 - own[1] / other[1] for own, other in pairs)
    return dict(sorted(found.items()))


def half_width(values, level=0.9):
    """Half of the interval of a mean, by Student's distribution."""
    spread = statistics.stdev(values) / len(values) ** 0.5
    return spread * student.ppf((1 + level) / 2, len(values) - 1)


def forgets(method, reference):
    """How much more a method forgets than the reference for what that has learned in the middle, in words."""
    shares = []
    for seed in method.keys() & reference.keys():
        loss = loss_where_learned(reference[seed], MIDDLE)
        own, least = (forgotten_at(curves[seed], loss) for curves in (method, reference))
        if own is None:
            return "never learns it"
        if least:
            shares.append(own / least - 1)
    return f"{statistics.mean(shares):+.0%}" if shares else ""
