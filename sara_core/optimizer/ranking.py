"""The largest scores of a whole model, kept as one byte a weight until all are known."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..weights.selection import select
from ..weights.shards import held, is_sharded, total

CODES = 256
FINER = 20  # bits of a float32 that a code leaves out: codes are eighths of an octave


class Ranking:
    """Takes scores parameter by parameter, and tells where the largest of all lie.

    Codes span 32 octaves around the mean score of the first parameter that has any; what lies outside counts as what lies
    at their ends. They are in main memory, those of divided parameters where these are.
    """

    def __init__(self) -> None:
        self._codes: dict[str, Tensor] = {}
        self._lowest: int | None = None
        self._num_above_zero = 0

    def take(self, name: str, score: Tensor) -> None:
        """Take the scores of a parameter, float32, finite and not negative; they are used up."""
        size = held(score)
        above_zero = int(total(score, torch.count_nonzero(size)))
        self._num_above_zero += above_zero
        if self._lowest is None and above_zero:
            mean = float(total(score, size.sum())) / above_zero
            self._lowest = (_bits_of(mean) >> FINER) - CODES // 2
        is_zero = size == 0
        bits = size.view(torch.int32).bitwise_right_shift_(FINER)
        bits.sub_(self._lowest or 0).clamp_(1, CODES - 1).masked_fill_(is_zero, 0)
        if is_sharded(score):
            self._codes[name] = torch.zeros_like(score, dtype=torch.uint8)
            held(self._codes[name]).copy_(bits)
        else:
            self._codes[name] = bits.to("cpu", torch.uint8)

    def largest(self, fraction: float) -> dict[str, Tensor]:
        """Return the sorted flat positions of the largest scores, none of them 0, by parameter name.

        Of those with the code at the border an evenly spread part is taken.
        """
        numel = sum(codes.numel() for codes in self._codes.values())
        count = min(max(1, round(fraction * numel)), self._num_above_zero)
        if not count:
            return {}
        return select(_Turned(self._codes), num_trainable=count, zeros="train").index


class _Turned(Mapping):
    """Codes as numbers that are the smaller the larger the code, made when they are asked for."""

    def __init__(self, codes: Mapping[str, Tensor]):
        self._codes = codes

    def __getitem__(self, name: str) -> Tensor:
        return self._codes[name].float().neg_().add_(CODES - 1)

    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)


def _bits_of(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.float32).view(torch.int32))
