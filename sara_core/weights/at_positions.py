"""Read and write single weights of a dense tensor by their flat positions."""

import torch
from torch import Tensor

WITH_PUT = ("cpu", "cuda", "xpu")  # devices for which torch has put_
INT32_LIMIT = 1 << 31


def index_dtype(numel: int) -> torch.dtype:
    """Return the dtype of flat positions in a tensor of so many weights: int32 if they fit."""
    return torch.int32 if numel < INT32_LIMIT else torch.int64


def read(dense: Tensor, index: Tensor) -> Tensor:
    """Return the weights at flat row-major positions, int32 or int64 `(k,)`. Returns `(k,)`."""
    return dense.reshape(-1).gather(0, index.long())  # index_select uses one core


def write_(dense: Tensor, index: Tensor, values: Tensor, accumulate: bool = False) -> Tensor:
    """Put values `(k,)` of the tensor's dtype at flat row-major positions, each named once.

    Any memory layout will do. Also works in torch's deterministic mode, which refuses `put_` as it
    does not know that no position comes twice.

    Args:
        dense: Changed in place, and returned.
        index: Shape `(k,)`, int32 or int64.
        values: Shape `(k,)`.
        accumulate: Add the values to what is there.
    """
    index = index.long()
    refused = torch.are_deterministic_algorithms_enabled()
    refused &= not torch.is_deterministic_algorithms_warn_only_enabled()
    if dense.device.type in WITH_PUT and not refused:
        return dense.put_(index, values, accumulate)
    if dense.is_contiguous():
        dense.view(-1).index_put_((index,), values, accumulate)
        return dense
    return dense.index_put_(torch.unravel_index(index, dense.shape), values, accumulate)
