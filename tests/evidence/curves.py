"""What was learned against what was forgotten, as curves that can be compared at equal forgetting."""

import random
import statistics
from collections import defaultdict

from ..emoji64 import BASE_STYLES

LEVELS = 21  # at which two curves are compared
DRAWS = 10_000


def forgotten(losses):
    """Mean loss on the styles of the base."""
    return statistics.mean(losses[style] for style in BASE_STYLES)


def points(runs):
    """Forgotten and learned by method and seed: a list over its rates and strengths.

    Forgotten is how much the loss on the base's own styles has grown; learned the loss on concepts of
    the new style that were not shown (lower is more).
    """
    start = {run["seed"]: run["losses"]["0"] for run in runs if run["method"] == "none"}
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for losses in run["losses"].values() if run["method"] != "none" else ():
            grown = forgotten(losses) - forgotten(start[run["seed"]])
            found[run["name"]][run["seed"]].append((grown, losses["new"]))
    return {name: dict(seeds) for name, seeds in found.items()}


def best(spots):
    """The spots that none of the others beats in both, by what is forgotten."""
    kept = []
    for grown, new in sorted(spots):
        if not kept or new < kept[-1][1]:
            kept.append((grown, new))
    return kept


def learned_at(curve, grown):
    """Loss in the new style at so much forgotten, on straight lines between spots; None outside them.

    Beyond the last spot more is forgotten for nothing, so that its loss holds on.
    """
    for (x0, y0), (x1, y1) in zip(curve[:-1], curve[1:], strict=True):
        if x0 <= grown <= x1:
            return y0 + (y1 - y0) * (grown - x0) / (x1 - x0)
    return curve[-1][1] if grown >= curve[-1][0] else None


def forgotten_at(curve, new):
    """Least that is forgotten where the loss in the new style is so low; None where it never is."""
    for (x0, y0), (x1, y1) in zip(curve[:-1], curve[1:], strict=True):
        if y1 <= new <= y0:
            return x1 if y0 == y1 else x0 + (x1 - x0) * (y0 - new) / (y0 - y1)
    return None


def learned_by_all(by_name):
    """The lowest loss in the new style that every curve of every method reaches."""
    return max(
        min(new for _, new in spots) for seeds in by_name.values() for spots in seeds.values()
    )


def common_range(by_name):
    """From where to where all curves of all methods can be compared."""
    curves = [best(spots) for seeds in by_name.values() for spots in seeds.values()]
    return max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)


def levels_between(low, high, count=LEVELS):
    """Evenly spread amounts of forgetting."""
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def advantage(method, reference, levels):
    """How much lower a method's loss is than the reference's at equal forgetting, in seeds both have.

    Args:
        method: Spots by seed.
        reference: Spots by seed of each of several methods, of which the best at each level counts.
        levels: Amounts of forgetting.

    Returns:
        Shares by seed, the mean over the levels: 0.02 is two percent lower.
    """
    found = {}
    for seed in method:
        rivals = [best(spots[seed]) for spots in reference if seed in spots]
        shares = []
        for level in levels:
            own = learned_at(best(method[seed]), level)
            others = [learned_at(curve, level) for curve in rivals]
            others = [loss for loss in others if loss is not None]
            if own is not None and others:
                shares.append(1 - own / min(others))
        if shares:
            found[seed] = statistics.mean(shares)
    return found


def interval(values, level=0.9, draws=DRAWS):
    """Bootstrap interval of the mean."""
    values, chance = list(values), random.Random(0)
    means = sorted(statistics.mean(chance.choices(values, k=len(values))) for _ in range(draws))
    cut = int((1 - level) / 2 * draws)
    return means[cut], means[-1 - cut]
