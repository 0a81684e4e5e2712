"""Pack sorted positions into about one byte each: Rice-coded gaps.

A gap is split into `width` low bits, stored as they are, and the rest, stored in unary. For
positions spread evenly this needs 0.2 bits more than the entropy: 3.7 bits a position at a density
of 20 %, 9.1 at 0.5 %. The layout is specified in docs/delta-format.md.
"""

import numpy as np

MAX_WIDTH = 40
SAMPLE = 1 << 12  # gaps the width is chosen by
EIGHT = 8  # widths up to here are packed eight low bits at a time, in a 64-bit number
MANY = 1 << 23  # positions whose low bits of up to eight add up to less than 2**31
ALL = (1 << 64) - 1
LOWER_HALVES = (0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF)  # of 16, 32, 64 bits


def encode(index: np.ndarray) -> tuple[int, np.ndarray]:
    """Pack positions.

    Args:
        index: Shape `(k,)`, int32 or int64, strictly ascending from at least 0, `k > 0`.

    Returns:
        The number of low bits, and the packed bytes as uint8.
    """
    steps = np.subtract(index[1:], index[:-1])
    largest = max(int(index[0]), int(steps.max(initial=1)) - 1)
    gaps = np.empty(len(index), np.min_scalar_type(largest + 1))  # one byte mostly, so faster
    gaps[0] = index[0]
    np.subtract(steps, 1, out=gaps[1:], casting="unsafe")
    width = _best_width(gaps)
    low = _pack_low_bits(gaps, width)
    gaps >>= width
    gaps += 1
    ends = gaps.astype(np.int64)
    np.cumsum(ends, out=ends)
    unary = np.zeros(int(ends[-1]) + 1, bool)  # of which the first is not used
    unary[ends] = True
    return width, np.concatenate([low, np.packbits(unary[1:], bitorder="little")])


def decode(packed: np.ndarray, width: int, count: int, limit: int) -> np.ndarray:
    """Unpack positions.

    Args:
        packed: Bytes from `encode`, uint8. Nothing larger than about ten times its size is
            allocated.
        width: Number of low bits.
        count: Number of positions, > 0.
        limit: All positions are below it.

    Returns:
        Shape `(count,)`, strictly ascending; int32 if `limit` is below 2**31, otherwise int64.

    Raises:
        ValueError: The bytes do not hold exactly `count` positions below `limit`.
    """
    num_low = (count * width + 7) // 8
    if not 0 <= width <= MAX_WIDTH or num_low >= len(packed) or count << width >= 1 << 62:
        raise ValueError(f"{len(packed)} bytes cannot hold {count} positions of {width} low bits")
    unary = np.unpackbits(packed[num_low:], bitorder="little").view(bool)
    num_ones = np.count_nonzero(unary)
    if num_ones != count or not packed[-1]:
        raise ValueError(f"{num_ones} positions are packed where {count} were announced")
    ends = np.flatnonzero(unary)
    low = _unpack_low_bits(packed[:num_low], width, count)
    dtype = np.int32 if limit < 1 << 31 else np.int64
    narrow = width <= EIGHT and count < MANY
    low = low.astype(np.int16 if narrow else np.int64)
    low -= (1 << width) - 1  # as `ends` counts the ones too, and each becomes 1 << width
    sums = np.cumsum(low, dtype=dtype if narrow else np.int64)
    last = ((int(ends[-1]) + 1) << width) + int(sums[-1]) - 1
    if last >= limit:
        raise ValueError(f"a position is out of range: {last}, expected less than {limit}")
    index = ends.astype(sums.dtype)
    index <<= width  # may wrap around, and comes back
    index += sums
    index += (1 << width) - 1
    return index.astype(dtype, copy=False)


def _best_width(gaps: np.ndarray) -> int:
    sample = gaps[:: max(1, len(gaps) // SAMPLE)]
    guess = int(np.log2(max(1.0, sample.mean() * np.log(2))))
    candidates = range(max(0, guess - 1), guess + 3)
    costs = {w: len(sample) * w + int((sample >> w).sum(dtype=np.int64)) for w in candidates}
    return min(costs, key=lambda width: costs[width])


def _pack_low_bits(gaps: np.ndarray, width: int) -> np.ndarray:
    if width > EIGHT:
        bits = np.empty((len(gaps), width), np.uint8)
        for bit in range(width):
            bits[:, bit] = (gaps >> bit) & 1
        return np.packbits(bits.reshape(-1), bitorder="little")
    low = np.zeros(-(-len(gaps) // 8) * 8, np.uint8)
    np.bitwise_and(gaps, (1 << width) - 1, out=low[: len(gaps)], casting="unsafe")
    words = low.view("<u8")
    for level, lower in enumerate(LOWER_HALVES):  # of each pair, the upper comes down to the lower
        upper = words & np.uint64(ALL - lower)
        upper >>= np.uint64((8 - width) << level)
        words &= np.uint64(lower)
        words |= upper
    packed = np.empty((len(words), width), np.uint8)
    for byte in range(width):  # a column at a time, as numpy is slow to copy short rows
        packed[:, byte] = low[byte::8]
    return packed.reshape(-1)[: (len(gaps) * width + 7) // 8]


def _unpack_low_bits(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    if width > EIGHT:
        bits = np.unpackbits(packed, count=count * width, bitorder="little").reshape(count, width)
        low = np.zeros(count, np.int64)
        for bit in reversed(range(width)):
            low += low
            low += bits[:, bit]
        return low
    low = np.zeros(-(-count // 8) * 8, np.uint8)
    for byte in range(width):
        column = packed[byte::width]
        low[byte::8][: len(column)] = column
    words = low.view("<u8")
    for level, lower in reversed(list(enumerate(LOWER_HALVES))):
        shift = (8 - width) << level
        upper = words << np.uint64(shift)
        upper &= np.uint64(ALL - lower)
        words &= np.uint64(lower & lower >> shift)
        words |= upper
    return low[:count]
