"""What the widgets in the browser draw, as plain numbers; the drawing is in js/."""

from collections.abc import Sequence

import torch

from ..sara_core.weights.analysis import Analysis, block_of
from ..sara_core.weights.magnitudes import coarse_edge

SMALLEST = 1e-8  # magnitudes below are shown together
MAX_POINTS = 400  # about; up to twice as many on the way


def analysis_chart(analysis: Analysis, bytes_per_weight: int) -> dict:
    """Return the histogram of magnitudes, whole and by block, over eighths of an octave.

    Args:
        analysis: What was found.
        bytes_per_weight: Memory that training takes for each selected weight.

    Returns:
        `edges` of the bins, one more than there are `counts`; exact zeros are counted apart, as
        `zeros`. `blocks` holds name, number of weights, exact zeros and counts of each.
    """
    cutoff = analysis.cutoff
    blocks: dict[str, torch.Tensor] = {}
    for name, counts in cutoff.coarse.items():
        live = counts.clone()
        live[0] -= cutoff.zeros[name]
        block = block_of(name)
        blocks[block] = blocks[block] + live if block in blocks else live
    total = sum(blocks.values())
    filled = torch.nonzero(total)[:, 0].tolist() or [0]
    first = next(i for i in range(len(total)) if coarse_edge(i + 1) > SMALLEST)
    first = min(max(first, filled[0]), filled[-1])

    def shown(counts: torch.Tensor) -> list[int]:
        shown = counts[first : filled[-1] + 1].clone()
        shown[0] += counts[:first].sum()
        return shown.tolist()

    return {
        "threshold": cutoff.threshold,
        "skip_zeros": cutoff.skip_zeros,
        "total": cutoff.num_considered,
        "zeros": cutoff.num_zeros,
        "edges": [coarse_edge(i) for i in range(first, filled[-1] + 2)],
        "counts": shown(total),
        "blocks": [
            [name, tally.num_weights, tally.num_zeros, shown(blocks[name])]
            for name, tally in analysis.blocks.items()
        ],
        "bytes_per_weight": bytes_per_weight,
    }


class Curve:
    """A curve of any length in few points: means over as many values each."""

    def __init__(self, values: Sequence[float] = ()):
        self._means: list[float] = []
        self._sum, self._count, self._stride, self.length = 0.0, 0, 1, 0
        for value in values:
            self.add(value)

    def add(self, value: float) -> None:
        """Append a value; a value that is not finite is shown as the one before."""
        if value - value != 0:
            value = self._means[-1] if self._means else 0.0
        self.length += 1
        self._sum += value
        self._count += 1
        if self._count == self._stride:
            self._means.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self._means) == 2 * MAX_POINTS:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(a + b) / 2 for a, b in pairs]
            self._stride *= 2

    def points(self) -> list[list[float]]:
        """Return number and mean of each stretch of values; the number is that of its last one."""
        points = [[(i + 1) * self._stride, mean] for i, mean in enumerate(self._means)]
        if self._count:
            points.append([self.length, self._sum / self._count])
        return points
