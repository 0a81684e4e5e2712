"""Look at the magnitudes of weights a chunk at a time: histogram, exact quantile, threshold mask.

SaRA's mask is `M = 1[|w| < threshold]`, one absolute threshold for the whole model or one for each layer, the sign
kept (Hu et al. 2024, arXiv:2409.06633, eq. 2). Magnitudes are compared in float32, whose bit patterns
sort like the numbers.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .at_positions import index_dtype
from .shards import held, total

CHUNK_ON_CPU, CHUNK = 1 << 20, 1 << 24  # weights looked at in one go; few fit a processor's cache
NUM_BINS = 1 << 15  # upper 16 bits of a non-negative float32
COARSER = 4  # bits of the mantissa that coarse bins leave out
NON_FINITE_BIN = 0x7F80  # bins from here on hold infinity and NaN
NUM_COARSE_BINS = NON_FINITE_BIN >> COARSER


def magnitudes(weight: Tensor) -> Iterator[Tensor]:
    """Yield `|weight|` as flat float32 chunks in row-major order.

    A chunk is overwritten by the next; the taker may change it.
    """
    flat = held(weight).reshape(-1)
    size = _chunk(flat)
    buffer = torch.empty(min(size, len(flat)), dtype=torch.float32, device=flat.device)
    for chunk in flat.split(size):
        yield buffer[: len(chunk)].copy_(chunk).abs_()


def _chunk(weight: Tensor) -> int:
    return CHUNK_ON_CPU if weight.device.type == "cpu" else CHUNK


def _count(chunks: Iterator[Tensor]) -> int:
    """Count what is not zero or not False, and wait for the device once."""
    counts = [torch.count_nonzero(chunk) for chunk in chunks]
    return int(torch.stack(counts).sum()) if counts else 0


def magnitude_histogram(weight: Tensor) -> tuple[Tensor, int]:
    """Count weights by the upper 16 bits of `|w|` as float32, which sort like the magnitudes.

    Args:
        weight: Any shape, floating point. Not modified.

    Returns:
        Counts, shape `(NUM_BINS,)` int64 on the CPU, and the number of exact zeros.
    """
    counts = torch.zeros(NUM_BINS + 1, dtype=torch.int64, device=held(weight).device)
    for chunk in magnitudes(weight):
        counts[NUM_BINS] += len(chunk) - torch.count_nonzero(chunk)
        bins = chunk.view(torch.int32).bitwise_right_shift_(16)
        counts[:NUM_BINS] += torch.bincount(bins, minlength=NUM_BINS)
    counts = total(weight, counts.cpu())
    return counts[:NUM_BINS], int(counts[NUM_BINS])


def coarsened(histogram: Tensor) -> Tensor:
    """Add up the counts of `magnitude_histogram` over eighths of an octave, NaN and infinity left out.

    Returns:
        Shape `(NUM_COARSE_BINS,)`, int64; bin `i` begins at the float32 of the bits `i << 20`.
    """
    return histogram[:NON_FINITE_BIN].view(-1, 1 << COARSER).sum(1)


def coarse_edge(bin_: int) -> float:
    """Return the smallest magnitude of a bin of `coarsened`."""
    return bin_edge(bin_ << COARSER)


def bin_edge(bin_: int) -> float:
    """Return the smallest magnitude of a bin of `magnitude_histogram`."""
    return torch.tensor(bin_ << 16, dtype=torch.int32).view(torch.float32).item()


def bin_of(magnitude: float) -> int:
    """Return the histogram bin that a non-negative magnitude falls into."""
    return int(torch.tensor(magnitude, dtype=torch.float32).view(torch.int32)) >> 16


def bin_edges() -> Tensor:
    """Return the smallest magnitude of each finite bin and the end of the last, float32."""
    bits = torch.arange(NON_FINITE_BIN + 1, dtype=torch.int32) << 16
    return bits.view(torch.float32)


def count_small(weight: Tensor, threshold: float) -> int:
    """Count the weights with `|w| < threshold`, exact zeros included."""
    here = _count(chunk < threshold for chunk in magnitudes(weight))
    return int(total(weight, torch.tensor(here)))


class Place(NamedTuple):
    """Where the k-th smallest magnitude lies.

    Args:
        bin: Of `magnitude_histogram`.
        rank: Within the bin, from 0.
        below: Number of magnitudes in smaller bins.
        next_bin: The next bin that holds magnitudes, or the one above where none does.
    """

    bin: int
    rank: int
    below: int
    next_bin: int


class Level(NamedTuple):
    """A magnitude that occurs.

    Args:
        magnitude: As float32 has it.
        below: Number of smaller ones.
        up_to: Number of those that are not larger.
        above: What all that are larger reach at least: the next one, or the bin's edge that comes before it.
    """

    magnitude: float
    below: int
    up_to: int
    above: float


def place_of(histogram: Tensor, k: int) -> Place:
    """Find the bin of the k-th smallest magnitude (k counts from 0) among those counted."""
    cumulative = histogram.cumsum(0)
    bin_ = int(torch.searchsorted(cumulative, k, right=True))
    below = int(cumulative[bin_ - 1]) if bin_ else 0
    larger = histogram[bin_ + 1 :].nonzero()
    return Place(bin_, k - below, below, bin_ + 1 + int(larger[0] if len(larger) else 0))


def counts_within(weight: Tensor, bins: Sequence[int]) -> Tensor:
    """Count the magnitudes in some bins of `magnitude_histogram` by the lower 16 bits, in one pass.

    Returns:
        Shape `(len(bins), 65536)`, int64 on the CPU.
    """
    different = list(dict.fromkeys(bins))
    counts = torch.zeros((len(different), 1 << 16), dtype=torch.int64, device=held(weight).device)
    for chunk in magnitudes(weight):
        bits, turned = chunk.view(torch.int32), 0
        for row, bin_ in zip(counts, different, strict=True):
            bits = bits.bitwise_xor_((turned ^ bin_) << 16)  # zero in the upper bits if it is there
            row += torch.bincount(bits[bits <= 0xFFFF], minlength=1 << 16)
            turned = bin_
    return total(weight, counts.cpu())[[different.index(bin_) for bin_ in bins]]


def level_at(place: Place, counts: Tensor) -> Level:
    """Return the magnitude at a place exactly, from the `counts_within` its bin."""
    cumulative = counts.cumsum(0)
    low = int(torch.searchsorted(cumulative, place.rank, right=True))
    larger = counts[low + 1 :].nonzero()
    above = low + 1 + int(larger[0]) if len(larger) else (place.next_bin - place.bin) << 16
    bits = torch.tensor([low, above], dtype=torch.int32) + (place.bin << 16)
    below = place.below + (int(cumulative[low - 1]) if low else 0)
    magnitude, next_one = bits.view(torch.float32).tolist()
    return Level(magnitude, below, place.below + int(cumulative[low]), next_one)


def mark_small_weights(weight: Tensor, threshold: float, skip_zeros: bool = False) -> Tensor:
    """Mark the weights that lie closer to zero than `threshold`.

    Args:
        weight: Shape `(*s)`, floating point, any device. Not modified.
        threshold: Absolute value, compared in float32; a weight exactly at it is not marked.
        skip_zeros: Do not mark exact zeros.

    Returns:
        Bool mask, shape `(*s)`, on the device of `weight`. NaN is never marked.

    Source: Hu et al. 2024, arXiv:2409.06633, eq. 2.
    """
    size = weight.detach().float().abs()
    mask = size < threshold
    return mask & (size > 0) if skip_zeros else mask


class EqualPart(NamedTuple):
    """An evenly spread part of all weights of one magnitude.

    Args:
        magnitude: Which.
        taken: Number of weights in the part.
        of: Number of weights of that magnitude.
    """

    magnitude: float
    taken: int
    of: int

    def add_to(self, marked: Tensor, is_equal: Tensor, first: int) -> int:
        """Mark those that are in the part.

        Args:
            marked: Bool mask, shape `(n,)`, of some weights; changed in place.
            is_equal: Which of them have the magnitude, of the same shape.
            first: Number of weights of that magnitude before these.

        Returns:
            The number up to the end of these.
        """
        places = torch.nonzero(is_equal)[:, 0]
        ranks = torch.arange(first, first + len(places), device=places.device)
        steps = ranks * self.taken // self.of
        marked[places] = (ranks + 1) * self.taken // self.of > steps
        return first + len(places)


def count_equal(weight: Tensor, magnitude: float) -> int:
    """Count the weights of one magnitude, of those held in this process."""
    return _count(chunk == magnitude for chunk in magnitudes(weight))


def small_weight_index(weight: Tensor, threshold: float, skip_zeros: bool = False) -> Tensor:
    """Return the sorted flat positions of the weights that `mark_small_weights` marks.

    Returns:
        Shape `(k,)`, int32 (int64 for 2**31 weights or more), on the device of `weight`.
    """
    return selected_index(weight, threshold, skip_zeros)[0]


def selected_index(
    weight: Tensor,
    threshold: float,
    skip_zeros: bool = False,
    equal: EqualPart | None = None,
    first: int = 0,
) -> tuple[Tensor, int]:
    """Return the sorted flat positions of small weights, and of a part of those of one magnitude.

    Args:
        weight: Shape `(*s)`, floating point, any device. Not modified.
        threshold: See `mark_small_weights`.
        skip_zeros: See `mark_small_weights`.
        equal: The part; of weights that are not marked.
        first: Number of weights of its magnitude in what comes before.

    Returns:
        Positions as of `small_weight_index`, and the number of weights of that magnitude up to here.
    """
    dtype, flat = index_dtype(weight.numel()), held(weight).reshape(-1)
    size, parts = _chunk(flat), []
    for n, chunk in enumerate(flat.split(size)):
        marked = mark_small_weights(chunk, threshold, skip_zeros)
        if equal is not None:
            first = equal.add_to(marked, chunk.float().abs() == equal.magnitude, first)
        parts.append(torch.nonzero(marked)[:, 0].add_(n * size).to(dtype))
    return torch.cat(parts), first
