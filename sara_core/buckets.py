"""Sizes to train at: a few aspect ratios of one area, each picture cropped to the nearest."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CROPS = ("centre", "random", "none")
TIERS = (1.0, 0.75, 0.5, 0.35, 0.25)  # of the side, for pictures too small for the full size
SMALLEST_WINDOW = 0.75  # of a further random crop, as a share of the first one's side


@dataclass(frozen=True)
class SizeRule:
    """How large pictures are trained.

    Args:
        side: Side in pixels of a square of the area to train at.
        unit: Width and height are multiples of it; the VAE's downscaling times the patch size.
        step: Distance between bucket sides, a multiple of `unit`; 0 takes an eighth of the side,
            at most 64.
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
    sides = [_tier(picture, rule) for picture in pictures]
    if rule.crop == "none":
        return [s and _own_size(p, s, rule.unit) for p, s in zip(pictures, sides, strict=True)]
    sizes: list[tuple[int, int] | None] = [None] * len(pictures)
    for side in {s for s in sides if s}:
        members = [i for i, s in enumerate(sides) if s == side]
        shapes = Counter(pictures[i] for i in members)
        kept = _few(shapes, _candidates(side, rule), rule.max_buckets)
        for i in members:
            sizes[i] = _nearest(pictures[i], kept)
    return sizes


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
        w, h = size[0] * scale * shrink, size[1] * scale * shrink
        left, top = (width - w) * x, (height - h) * y
        window = (left, top, min(left + w, width), min(top + h, height))
        if (rounded := tuple(round(edge) for edge in window)) not in seen:
            seen.add(rounded)
            yield window


def _tier(picture: tuple[int, int], rule: SizeRule) -> int | None:
    """Return the largest side whose area the picture fills without too much enlarging."""
    own = math.sqrt(picture[0] * picture[1])
    for share in TIERS:
        side = rule.side * share
        if side >= rule.unit and side <= own * rule.max_upscale * 1.001:
            return round(side)
    return None


def _candidates(side: int, rule: SizeRule) -> list[tuple[int, int]]:
    """List sizes of about the area `side ** 2` and at most the longest aspect."""
    step = rule.step or max(rule.unit, min(64, side // 8) // rule.unit * rule.unit)
    found = set()
    for width in range(step, side * 4, step):
        height = max(step, int(side * side / width / step + 1e-6) * step)
        if max(width, height) <= rule.max_aspect * min(width, height):
            found |= {(width, height), (height, width)}
    square = max(step, side // step * step)
    # Only sizes that use the area: rounding down may leave some far below it.
    return [(w, h) for w, h in sorted(found) if w * h >= 0.75 * square * square]


def _own_size(picture: tuple[int, int], side: int, unit: int) -> tuple[int, int]:
    factor = min(1.0, side / math.sqrt(picture[0] * picture[1]))
    return tuple(max(unit, int(edge * factor / unit + 0.5) * unit) for edge in picture)


def _cropped(picture: tuple[int, int], size: tuple[int, int]) -> float:
    """Tell how much a size cuts off, the log of the ratio of aspects; ties go to the larger area."""
    aspect = abs(math.log(picture[0] / picture[1] * size[1] / size[0]))
    return aspect - 1e-6 * math.log(size[0] * size[1])


def _nearest(picture: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return min(sizes, key=lambda size: (_cropped(picture, size), size))


def _few(shapes: Counter, sizes: list, max_buckets: int) -> list[tuple[int, int]]:
    """Drop sizes, those first without which least is cropped off, until few are left."""
    kept = sorted({_nearest(picture, sizes) for picture in shapes})

    def cost(gone: tuple[int, int]) -> float:
        others = [size for size in kept if size != gone]
        return sum(n * _cropped(p, _nearest(p, others)) for p, n in shapes.items())

    while len(kept) > max_buckets:
        kept.remove(min(kept, key=cost))
    return kept
