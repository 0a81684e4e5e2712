"""What the histogram of SaRA Analyze draws, as plain numbers; the drawing is in js/sara_analyze.js."""

import torch

from ...sara_core.weights.analysis import Analysis, block_of
from ...sara_core.weights.magnitudes import coarse_edge

SMALLEST = 1e-8  # magnitudes below are shown together


def analysis_chart(analysis: Analysis, bytes_per_weight: int) -> dict:
    """Return the histogram of magnitudes, whole and by block, over eighths of an octave.

    Args:
        analysis: What was found.
        bytes_per_weight: Memory that training takes for each selected weight.

    Returns:
        `edges` of the bins, one more than there are `counts`; exact zeros are counted apart, as
        `zeros`. `blocks` holds name, number of weights, exact zeros and counts of each.
    """
    cutoff, seen = analysis.cutoff, analysis.survey
    blocks: dict[str, torch.Tensor] = {}
    for name, counts in seen.coarse.items():
        live = counts.clone()
        live[0] -= seen.zeros[name]
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
        "total": seen.num_weights,
        "zeros": seen.num_zeros,
        "edges": [coarse_edge(i) for i in range(first, filled[-1] + 2)],
        "counts": shown(total),
        "blocks": [
            [name, tally.num_weights, tally.num_zeros, shown(blocks[name])]
            for name, tally in analysis.blocks.items()
        ],
        "bytes_per_weight": bytes_per_weight,
    }
