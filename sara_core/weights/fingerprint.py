"""Recognise the base a delta was made on, from a few of its weights."""

import base64
import binascii
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from . import shards

NUM_SAMPLES = 32
SPREAD = 2654435761  # Knuth's multiplicative hash; scatters the samples over a parameter


def sample_positions(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    """Say which weights are sampled: 32 (name, flat position) pairs spread over the parameters.

    They depend on the names and shapes alone, so that any reader finds the same ones.
    """
    names = sorted(shapes)
    positions = []
    for sample in range(NUM_SAMPLES):
        name = names[sample * len(names) // NUM_SAMPLES]
        numel = int(np.prod(shapes[name], dtype=np.int64))
        positions.append((name, (sample + 1) * SPREAD % numel))
    return positions


def take_fingerprint(weights: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """Sample the base weights of some parameters.

    Args:
        weights: Base weights by name; may hold further ones. A mapping that makes its weights when
            they are asked for can tell their shapes cheaply by an attribute `stored`, a mapping to
            anything with a shape.
        names: Of the parameters in which weights are selected.

    Returns:
        The weights' dtype, a colon and 32 little-endian float32 values in base64.
    """
    samples = sample_positions(_shapes(weights, names))
    values = torch.stack([_at(weights[name], position) for name, position in samples])
    dtype = str(weights[samples[0][0]].dtype).removeprefix("torch.")
    return f"{dtype}:{base64.b64encode(values.numpy().astype('<f4').tobytes()).decode()}"


def is_same_base(
    fingerprint: str, weights: Mapping[str, Tensor], index: Mapping[str, Tensor]
) -> bool:
    """Tell whether `weights` are those the fingerprint was taken of, up to a change of dtype.

    They are compared at the coarsest of the precisions that either has gone through, those they are
    held in and those their values give away: a bfloat16 file may have been loaded as float32.

    Selected positions are skipped, so weights that a delta on the same base has changed do not
    count as different. Without any other sample the answer is yes.

    Args:
        fingerprint: From `take_fingerprint`; an unreadable one never matches.
        weights: Weights by name, with the names and shapes of `index`' parameters.
        index: Selected positions by name, as the delta holds them.
    """
    dtype_name, _, encoded = fingerprint.partition(":")
    dtype = getattr(torch, dtype_name, None)
    try:
        values = np.frombuffer(base64.b64decode(encoded, validate=True), "<f4")
    except (ValueError, binascii.Error):
        return False
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        return False
    if len(values) != NUM_SAMPLES:
        return False
    if not index:
        return True
    samples = sample_positions(_shapes(weights, index))
    expected = torch.from_numpy(values.copy())
    found = torch.stack([_at(weights[name], position) for name, position in samples])
    dtypes = {dtype, weights[samples[0][0]].dtype, *_precisions(expected), *_precisions(found)}
    infos = [torch.finfo(one) for one in dtypes if one.is_floating_point]
    relative = max(info.eps for info in infos)
    absolute = max(info.eps * info.smallest_normal for info in infos)
    differ = (found - expected).abs() > relative * expected.abs() + absolute
    return all(
        bool((index[name] == position).any())
        for (name, position), is_other in zip(samples, differ.tolist(), strict=True)
        if is_other
    )


def _precisions(values: Tensor) -> list[torch.dtype]:
    """List the half precisions in which all values are exact, so that they may come from there."""
    halves = (torch.bfloat16, torch.float16)
    return [dtype for dtype in halves if torch.equal(values.to(dtype).float(), values)]


def _shapes(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    stored = getattr(weights, "stored", weights)
    return {name: tuple(stored[name].shape) for name in names}


def _at(weight: Tensor, position: int) -> Tensor:
    if shards.is_sharded(weight):
        return shards.value_at(weight, position)
    where = np.unravel_index(position, tuple(weight.shape))
    return weight.detach()[tuple(int(i) for i in where)].float().cpu()
