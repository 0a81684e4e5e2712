"""Curves of several runs in one picture, drawn with Pillow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...sara_core.training.run_history import RunHistory, differing
from ..fonts import font_for

WIDTH, HEIGHT, LINE, TEXT = 1000, 520, 24, 15
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 40
INK, FAINT, GRID = "#222222", "#777777", "#dddddd"
COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#d62728", "#8c564b", "#e377c2", "#17becf")
TICKS = 5
CUT = 0.005  # share of the highest values that may lie above the frame


@dataclass(frozen=True)
class Frame:
    """Where steps and losses lie in the picture."""

    last_step: int
    low: float
    high: float

    def place(self, step: float, loss: float) -> tuple[float, float]:
        """Return x and y in pixels; losses beyond the frame lie on its edge."""
        x = LEFT + step / self.last_step * (WIDTH - LEFT - RIGHT)
        share = (min(max(loss, self.low), self.high) - self.low) / (self.high - self.low)
        return x, TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)


def smoothed(losses: Sequence[tuple[int, float]], smoothing: float) -> list[tuple[int, float]]:
    """Return an exponential mean of losses up to each step, which no value before the first pulls at.

    Args:
        losses: Step and loss; those that are not finite are left out.
        smoothing: Weight of what was before, in `[0, 1)`.
    """
    points, total, weight = [], 0.0, 0.0
    for step, loss in losses:
        if math.isfinite(loss):
            total = smoothing * total + (1 - smoothing) * loss
            weight = smoothing * weight + (1 - smoothing)
            points.append((step, total / weight))
    return points


def draw_runs(histories: Sequence[RunHistory], smoothing: float) -> Tensor:
    """Draw the smoothed loss of each run, and its loss on the pictures held out as dots.

    Returns:
        IMAGE, `(1, H, W, 3)` in `[0, 1]`.
    """
    curves = [smoothed(history.losses, smoothing) for history in histories]
    measured = [[p for p in h.validation if math.isfinite(p[1])] for h in histories]
    values = np.array([loss for points in (*curves, *measured) for _, loss in points] or [0.0])
    low, high = float(values.min()), float(np.quantile(values, 1 - CUT))
    frame = Frame(
        max(history.losses[-1][0] for history in histories),
        low,
        max(high, low + 1e-9 + 1e-3 * abs(low)),
    )
    lines = [legend(history, smoothing) for history in histories]
    picture = Image.new("RGB", (WIDTH, HEIGHT + LINE * len(lines) + 8), "white")
    draw, font = ImageDraw.Draw(picture), font_for("".join(lines), TEXT)
    _draw_axes(draw, font, frame)
    for number, (line, curve, points) in enumerate(zip(lines, curves, measured, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        if len(curve) > 1:
            draw.line([frame.place(*point) for point in curve], fill=colour, width=2)
        for x, y in (frame.place(*point) for point in points):
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill="white", outline=colour, width=2)
        y = HEIGHT + LINE * number
        draw.rectangle([LEFT, y + 6, LEFT + 24, y + 10], fill=colour)
        draw.text((LEFT + 34, y), line, fill=INK, font=font)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def _draw_axes(draw: ImageDraw.ImageDraw, font, frame: Frame) -> None:
    for tick in range(TICKS + 1):
        loss = frame.low + (frame.high - frame.low) * tick / TICKS
        step = round(frame.last_step * tick / TICKS)
        x, y = frame.place(step, loss)
        draw.line([LEFT, y, WIDTH - RIGHT, y], fill=GRID)
        draw.text((LEFT - 8, y), f"{loss:.4g}", fill=FAINT, font=font, anchor="rm")
        draw.text((x, HEIGHT - BOTTOM + 8), str(step), fill=FAINT, font=font, anchor="ma")


def legend(history: RunHistory, smoothing: float) -> str:
    """Tell in a line how a run went."""
    points = smoothed(history.losses, smoothing)
    last = f"loss {points[-1][1]:.4f}" if points else "no finite loss"
    text = f"{history.name}: {history.losses[-1][0]} of {history.settings.steps} steps, {last}"
    measured = [p for p in history.validation if math.isfinite(p[1])]
    if measured:
        step, lowest = min(measured, key=lambda point: point[1])
        text += f", lowest validation {lowest:.4f} after {step}"
    return text


def report(histories: Sequence[RunHistory], smoothing: float) -> str:
    """Tell how each run went, and in what settings they differ."""
    lines = [legend(history, smoothing) for history in histories]
    names = differing(histories)
    if len(histories) > 1:
        lines += ["", "settings that differ:" if names else "their settings are the same"]
    for name in names:
        values = ", ".join(f"{h.name}: {getattr(h.settings, name)!r}" for h in histories)
        lines.append(f"  {name}: {values}")
    return "\n".join(lines)
