"""Pictures of what the nodes found, drawn with Pillow."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...sara_core.weights.analysis import Analysis
from ...sara_core.weights.magnitudes import NON_FINITE_BIN, bin_edges

WIDTH, HEIGHT, MARGIN = 900, 420, 60
LOWEST, HIGHEST = -6.0, 1.0  # log10 of the magnitude
NUM_BARS = 140
INK, SELECTED, OTHER, LINE = "#222222", "#4aa3ff", "#777777", "#c0392b"  # as in js/sara_chart.js


def magnitude_bars(analysis: Analysis) -> np.ndarray:
    """Count weights by log10 of their magnitude, in NUM_BARS bars from LOWEST to HIGHEST.

    Exact zeros are left out; magnitudes beyond an end count into the bar there.
    """
    counts = analysis.survey.histogram[:NON_FINITE_BIN].double().numpy().copy()
    counts[0] -= analysis.survey.num_zeros
    edges = bin_edges().double().numpy()
    middle = np.log10(np.maximum((edges[:-1] + edges[1:]) / 2, 1e-45))
    bar = (middle - LOWEST) / (HIGHEST - LOWEST) * NUM_BARS
    return np.bincount(np.clip(bar, 0, NUM_BARS - 1).astype(int), counts, minlength=NUM_BARS)


def histogram(analysis: Analysis) -> Tensor:
    """Draw log10|w| with the threshold. Returns an IMAGE, `(1, H, W, 3)` in `[0, 1]`."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=15)
    left, right, top, bottom = MARGIN, WIDTH - 20, 50, HEIGHT - 50
    bars = magnitude_bars(analysis)

    def x_of(log10: float) -> float:
        return left + (log10 - LOWEST) / (HIGHEST - LOWEST) * (right - left)

    threshold = float(np.log10(analysis.cutoff.threshold))
    for i, count in enumerate(bars):
        log10 = LOWEST + i / NUM_BARS * (HIGHEST - LOWEST)
        height = count / max(1.0, bars.max()) * (bottom - top)
        color = SELECTED if log10 < threshold else OTHER
        step = (HIGHEST - LOWEST) / NUM_BARS
        draw.rectangle([x_of(log10), bottom - height, x_of(log10 + step) - 1, bottom], fill=color)
    for decade in range(int(LOWEST), int(HIGHEST) + 1):
        draw.line([x_of(decade), bottom, x_of(decade), bottom + 5], fill=INK)
        draw.text((x_of(decade), bottom + 8), f"1e{decade}", fill=INK, font=font, anchor="ma")
    draw.line([left, bottom, right, bottom], fill=INK)
    x = min(max(x_of(threshold), left), right)
    draw.line([x, top - 8, x, bottom], fill=LINE, width=2)
    total = analysis.total
    share = total.num_selected / max(1, total.num_weights)
    draw.text(
        (left, 12),
        f"threshold {analysis.cutoff.threshold:.4g}: {total.num_selected:,} of "
        f"{total.num_weights:,} weights ({share:.2%}) would train",
        fill=INK,
        font=font,
    )
    draw.text(
        ((left + right) / 2, HEIGHT - 22),
        "magnitude of the weights",
        fill=INK,
        font=font,
        anchor="ma",
    )
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
