"""Sizes to train at: a few aspect ratios of one area, each picture cropped to the nearest."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CROPS = ("centre", "random", "none")
TIERS = (1.0, 0.75, 0.5, 0.35, 0.25)  # of the side, for pictures too small for the full size
ROUNDING = 1.001
SMALLEST_WINDOW = 0.75  # of a further random crop, as a share of the first one's side


@dataclass(frozen=True)
class SizeRule:
    """How large pictures are trained.

    Args:
        side: Side in pixels of a square of the area to train at.
        unit: Width and height are multiples of it; the VAE's downscaling times the patch size.
        step: Widths and heights are multiples of it, itself a multiple of `unit`; 0 takes an eighth
            of the side, at most 64, or the unit where nothing is cropped.
        max_buckets: Number of different sizes of one area, at least 1.
        max_upscale: A picture is enlarged up to this factor; one that would need more is trained at
            a smaller area, one of TIERS.
        max_aspect: Longest bucket, as the ratio of its sides.
        crop: "centre" and "random" crop a picture to its bucket; "none" gives each picture a size
            of its own, so that nothing is lost, and ignores the number of buckets.

    Raises:
        ValueError: A value out of range.
    """

    side: int
    unit: int = 16
    step: int = 0
    max_buckets: int = 5
    max_upscale: float = 1.25
    max_aspect: float = 2.0
    crop: str = "centre"

    def __post_init__(self):
        if self.crop not in CROPS:
            raise ValueError(f"crop is {self.crop!r}; expected one of {', '.join(CROPS)}")
        if self.side < self.unit or self.unit < 1:
            raise ValueError(
                f"the size is {self.side} pixels, but this VAE needs at least {self.unit}"
            )
        if self.step % self.unit:
            raise ValueError(
                f"sides are to be divisible by {self.step}, but this VAE needs multiples of "
                f"{self.unit}"
            )
        if self.step > self.side:
            raise ValueError(
                f"sides are to be divisible by {self.step}, more than the size of {self.side}; lower "
                "it, or 0 for a fitting one"
            )
        if self.max_buckets < 1 or self.max_upscale <= 0 or self.max_aspect < 1:
            raise ValueError("max_buckets and max_aspect are at least 1, max_upscale above 0")


def choose_sizes(pictures: Sequence[tuple[int, int]], rule: SizeRule) -> list[tuple | None]:
    """Choose the size each picture is trained at.

    Args:
        pictures: Width and height of each, in pixels.
        rule: Area, divisibility, number of buckets.

    Returns:
        Width and height for each, or None where a picture is too small even for the smallest area.
    """
    if rule.crop == "none":
        return [_own_size(picture, rule) for picture in pictures]
    tiers = [
        (round(rule.side * share), _candidates(round(rule.side * share), rule)) for share in TIERS
    ]
    wanted = {picture: _wanted(picture, tiers, rule) for picture in set(pictures)}
    counts = Counter(pictures)
    sizes: dict[tuple[int, int], tuple[int, int] | None] = dict.fromkeys(counts)
    for side, candidates in tiers:
        nearest = {p: found[1] for p, found in wanted.items() if found and found[0] == side}
        members = sorted(nearest)
        kept = _few({p: counts[p] for p in members}, candidates, rule.max_buckets)
        for picture in members:
            fitting = [k for k in kept if _scale(picture, k) <= rule.max_upscale * ROUNDING]
            sizes[picture] = _nearest(picture, fitting or [nearest[picture]])
    return [sizes[picture] for picture in pictures]


def crop_windows(
    picture: tuple[int, int], size: tuple[int, int], crop: str, count: int, seed: int
) -> Iterator[tuple[float, float, float, float]]:
    """Yield different windows of a picture to be resized to `size`: left, top, right, bottom.

    The first is as large as fits. Further ones lie beside it, spread evenly ("centre"), or anywhere
    and up to a quarter smaller ("random") but never so small that they had to be enlarged more.

    Args:
        picture: Width and height in pixels.
        size: Width and height it is resized to.
        crop: One of CROPS; "none" always yields the whole picture alone.
        count: Number of windows, at least 1; fewer come where they would not differ.
        seed: Of the random windows.
    """
    width, height = picture
    if crop == "none":
        yield 0.0, 0.0, float(width), float(height)
        return
    scale = min(width / size[0], height / size[1])
    dice, seen = random.Random(seed), set()
    for number in range(count):
        shrink, x, y = 1.0, 0.5, 0.5
        if crop == "random":
            smallest = min(1.0, max(SMALLEST_WINDOW, 1 / scale))
            shrink = dice.uniform(smallest, 1.0) if number else 1.0
            x, y = dice.random(), dice.random()
        elif count > 1:
            x = y = number / (count - 1)
        w = min(size[0] * scale * shrink, float(width))
        h = min(size[1] * scale * shrink, float(height))
        left, top = (width - w) * x, (height - h) * y
        window = (left, top, min(left + w, float(width)), min(top + h, float(height)))
        if (rounded := tuple(round(edge) for edge in window)) not in seen:
            seen.add(rounded)
            yield window


def _scale(picture: tuple[int, int], size: tuple[int, int]) -> float:
    """Return the factor by which a picture is enlarged to cover a size."""
    return max(size[0] / picture[0], size[1] / picture[1])


def _wanted(picture: tuple[int, int], tiers: list, rule: SizeRule) -> tuple | None:
    """Return the largest side, with its best size, that needs no enlarging beyond the limit."""
    for side, candidates in tiers:
        if candidates:
            size = _nearest(picture, candidates)
            if _scale(picture, size) <= rule.max_upscale * ROUNDING:
                return side, size
    return None


def _candidates(side: int, rule: SizeRule) -> list[tuple[int, int]]:
    """List sizes of about the area `side ** 2` and at most the longest aspect."""
    step = rule.step or max(rule.unit, min(64, side // 8) // rule.unit * rule.unit)
    square = side // step * step
    if not square:
        return []
    found = {(square, square)}
    for width in range(step, side * 4, step):
        height = int(side * side / width / step + 1e-6) * step
        long, short = max(width, height), min(width, height)
        # Rounding down may leave sizes far below the area; they are no use.
        if short and long <= rule.max_aspect * short and width * height >= 0.75 * square**2:
            found |= {(width, height), (height, width)}
    return sorted(found)


def _own_size(picture: tuple[int, int], rule: SizeRule) -> tuple[int, int] | None:
    """Return a picture's own shape at the area, rounded to the step; None if it is too small."""
    step = rule.step or rule.unit
    side = math.sqrt(picture[0] * picture[1])
    if side * rule.max_upscale < rule.side * TIERS[-1] or side < step:
        return None
    factor = min(1.0, rule.side / side)
    width, height = (max(step, int(edge * factor / step + 0.5) * step) for edge in picture)
    return width, height


def _cropped(picture: tuple[int, int], size: tuple[int, int]) -> float:
    """Tell how much a size cuts off, the log of the ratio of aspects; ties go to the larger area."""
    aspect = abs(math.log(picture[0] / picture[1] * size[1] / size[0]))
    return aspect - 1e-6 * math.log(size[0] * size[1])


def _nearest(picture: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return min(sizes, key=lambda size: (_cropped(picture, size), size))


def _few(shapes: Mapping, sizes: list, max_buckets: int) -> list[tuple[int, int]]:
    """Drop sizes, those first without which least is cropped off, until few are left.

    Args:
        shapes: Number of pictures of each width and height.
        sizes: To choose from.
        max_buckets: How many may be left.
    """
    kept = sorted({_nearest(picture, sizes) for picture in shapes})
    counts = np.array(list(shapes.values()), dtype=float)
    costs = np.array([[_cropped(picture, size) for size in kept] for picture in shapes])
    while len(kept) > max_buckets:
        best = costs.argmin(1)
        second = np.partition(costs, 1, axis=1)[:, 1]
        dearer = counts * (second - costs[np.arange(len(best)), best])
        gone = int(np.bincount(best, dearer, minlength=len(kept)).argmin())
        kept.pop(gone)
        costs = np.delete(costs, gone, axis=1)
    return kept
