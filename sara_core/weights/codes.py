"""Decoding of eight-bit codes, up to five times as fast as torch does it on a processor."""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 1 << 20  # codes turned into numbers in one go
# How float16 has the same bits: shifted by so many, without bit 14, exponents too small by this factor.
AS_FLOAT16 = {torch.float8_e4m3fn: (7, ~(1 << 14), 256.0), torch.float8_e5m2: (8, ~0, 1.0)}
NAN_OF_E4M3FN = 127  # either sign of it, which would become 480


def reader(codes: Tensor) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """Return the fastest of `look_up` and `shift` that is exact for some codes."""
    if codes.dtype not in AS_FLOAT16 or codes.dtype == torch.float8_e4m3fn and _has_nan(codes):
        return look_up
    return shift


def _has_nan(codes: Tensor) -> bool:
    parts = _flat(codes, torch.uint8)
    return any(bool((part & NAN_OF_E4M3FN == NAN_OF_E4M3FN).any()) for part in parts)


def look_up(codes: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """Write the numbers that codes of one byte each stand for.

    The 256 numbers are made by torch itself, so NaN and infinity come out right.

    Args:
        codes: Any shape and dtype of one byte, on the CPU.
        scale: Multiplies all of them, in float32; one number, or None.
        out: Shape of `codes`, contiguous, floating point. Changed, and returned.
    """
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    if scale is not None:
        table = table * scale.detach().to("cpu", torch.float32)
    table = table.to(out.dtype)
    for part, numbers in zip(_flat(codes, torch.uint8), out.view(-1).split(CHUNK), strict=True):
        torch.index_select(table, 0, part.int(), out=numbers)
    return out


def shift(codes: Tensor, scale: Tensor | None, out: Tensor) -> Tensor:
    """Do the same with float8, by moving its bits to where float16 has them; e4m3fn must hold no NaN.

    The numbers of other dtypes than float32 are looked up, as scaled they would be rounded twice.
    """
    if out.dtype != torch.float32:
        return look_up(codes, scale, out)
    distance, kept, bias = AS_FLOAT16[codes.dtype]
    factor = torch.tensor(bias)
    if scale is not None:
        factor = factor * scale.detach().to("cpu", torch.float32)
    for part, numbers in zip(_flat(codes, torch.int8), out.view(-1).split(CHUNK), strict=True):
        bits = part.to(torch.int16).bitwise_left_shift_(distance).bitwise_and_(kept)
        numbers.copy_(bits.view(torch.float16)).mul_(factor)
    return out


def _flat(codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return codes.reshape(-1).view(dtype).split(CHUNK)
