"""Numbers in eight bits: a code of torchao's dynamic map, and a scale for each 256 neighbours.

By its scale the largest of a block is kept exactly. Source: Dettmers et al. 2021, arXiv:2110.02861.
"""

import functools

import torch
from torch import Tensor

BLOCK = 256  # neighbours with one scale
GOLDEN = 0.6180339887
FULL = 2.0**14  # what a code of 1 is while it is looked up: float16 is slow below 6e-5
EDGE = 1e-4  # no chance is nearer to 0 or 1, so that a code's own value always yields that code


def refuse_missing_torchao() -> None:
    """Raise ImportError if torchao is missing, or fails."""
    _map(True, torch.device("cpu"))


def code_of_zero(signed: bool) -> int:
    """Return the code of 0."""
    return _map(signed, torch.device("cpu"))[3]


def unpack(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Return the numbers.

    Args:
        codes: Shape `(n * BLOCK,)`, uint8.
        scale: Shape `(n,)`, float32, on the same device.
        signed: As they were packed.
    """
    values, *_ = _map(signed, codes.device)
    numbers = values.index_select(0, codes.int())
    numbers.view(-1, BLOCK).mul_(scale[:, None])
    return numbers


def pack_(numbers: Tensor, signed: bool, chances: Tensor | float = 0.5) -> tuple[Tensor, Tensor]:
    """Return codes and scale.

    Args:
        numbers: Shape `(n * BLOCK,)`, float32. What they hold is lost.
        signed: Whether there are negative ones.
        chances: Shape `(BLOCK,)`: a number is rounded up if this much of the way to the next code, or
            more, lies behind it. 0.5 takes the nearest.
    """
    values, codes, slopes, _ = _map(signed, numbers.device)
    blocks = numbers.view(-1, BLOCK)
    scale = blocks.amax(1)
    if signed:  # the map ends at 1 and, on the other side, a little before -1
        scale = torch.maximum(scale, blocks.amin(1) / values[0])
    blocks *= (FULL / scale.clamp(min=torch.finfo(scale.dtype).tiny * FULL))[:, None]
    halves = numbers.half()
    bits = halves.view(torch.int16).int()
    bits += len(codes) // 2
    numbers -= halves
    numbers *= slopes.index_select(0, bits)
    numbers += codes.index_select(0, bits)
    blocks += 1 - chances
    return numbers.to(torch.uint8), scale


def chances(offset: float, device: torch.device) -> Tensor:
    """Return numbers between 0 and 1, shape `(BLOCK,)`, evenly spread and shifted by an offset."""
    return (_places(device) + offset).remainder_(1).clamp_(EDGE, 1 - EDGE)


@functools.lru_cache
def _places(device: torch.device) -> Tensor:
    return torch.tensor([place * GOLDEN % 1 for place in range(BLOCK)], device=device)


@functools.lru_cache
def _map(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return torchao's map.

    Returns:
        The value of each code, ascending, `(256,)`; of each float16, by its bits as an int16 counted
        from the least, the code that it would have if there were codes between codes, `(65536,)`, and
        how much that changes with the number, `(65536,)`; the code of zero.

    Raises:
        ImportError: torchao is missing, or fails.
    """
    try:
        from torchao.optim.quant_utils import create_dynamic_map
    except Exception as error:  # with a torch it does not fit, torchao may fail in any way
        raise ImportError(
            f"moments in 8 bits need the package torchao, which cannot be imported ({error}). Install "
            "or update it (pip install -U torchao) in the Python that runs this, in a version that "
            "fits its torch; without it only moments in fp32 can be used"
        ) from error
    values = torch.tensor(create_dynamic_map(signed=signed), dtype=torch.float32)
    per_gap = torch.cat([1 / values.diff(), values.new_zeros(1)])
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16).float().nan_to_num() / FULL
    below = torch.bucketize(halves, values, right=True).sub_(1).clamp_(min=0)
    slopes = per_gap[below]
    codes = below + (halves - values[below]) * slopes
    zero = int(torch.searchsorted(values, 0.0))
    return values.to(device), codes.to(device), (slopes / FULL).to(device), zero
