"""Say which tensors an operation writes to."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def written_to(
    function: torch._ops.OpOverload, args: tuple, kwargs: Mapping[str, Any]
) -> Iterator[Tensor]:
    """Yield the tensors that an operation changes, those in lists as well, by its schema."""
    if not function._schema.is_mutable:
        return
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in given if isinstance(given, (list, tuple)) else (given,):
                if isinstance(tensor, Tensor):
                    yield tensor
