"""Factors of the learning rate for single weights, kept as a byte each."""

import math

from torch import Tensor

from ..weights.shards import total

PER_OCTAVE, ONE = 32, 128  # codes of an octave, and that of a factor of 1
LARGEST = 8.0  # factor, and the inverse of the smallest


def coded(octaves: Tensor, whole: Tensor) -> Tensor:
    """Return codes of factors, whose geometric mean is 1.

    They are limited to an eighth and eight, and kept to within 1.1 %.

    Args:
        octaves: Logarithms to base 2 of rates, `(k,)`, float32; minus infinity is the smallest factor, and of no
            account for the mean. Used up.
        whole: The parameter they are of; if it is divided, they are of the part held here, and the mean
            is that of all.

    Returns:
        Shape `(k,)`, uint8.
    """
    finite = octaves.isfinite()
    count = total(whole, finite.sum()).clamp(min=1)
    mean = total(whole, octaves.where(finite, 0.0).sum()) / count
    most = math.log2(LARGEST)
    return octaves.sub_(mean).clamp_(-most, most).mul_(PER_OCTAVE).add_(ONE).round_().byte()


def factors(codes: Tensor) -> Tensor:
    """Return the factors of codes, float32."""
    return codes.float().sub_(ONE).div_(PER_OCTAVE).exp2_()
