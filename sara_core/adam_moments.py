"""AdamW's two moments of the trained weights: in float32, or in eight bits each.

Eight bits are a code of torchao's dynamic map (Dettmers et al. 2021, arXiv:2110.02861) and a scale for
each 256 neighbours, by which the largest of them is kept exactly. Of the second moment the root is stored. Stored itself, as
other optimizers do, it becomes zero where a gradient is a few thousandths of the largest of its block,
and the update, which is divided by it, hundreds of times too large.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

KINDS = ("fp32", "8bit")
BLOCK = 256  # neighbours with one scale
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
SCALE = "_scale"


def refuse_unusable(kind: str) -> None:
    """Raise if moments cannot be kept in this way.

    Raises:
        ValueError: Not one of `KINDS`.
        ImportError: For eight bits, torchao is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"moments={kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "8bit":
        _map(True, torch.device("cpu"))


def zeros(gradient: Tensor, kind: str) -> dict[str, Tensor]:
    """Return the moments before the first step.

    Args:
        gradient: Shape `(k,)`. Where it is not float32, moments are kept in its own dtype.
        kind: One of `KINDS`.
    """
    if kind == "fp32" or gradient.dtype != torch.float32:
        return {key: torch.zeros_like(gradient) for key in SIGNED}
    codes = {key: torch.zeros_like(gradient, dtype=torch.uint8) for key in SIGNED}
    num_blocks = -(-len(gradient) // BLOCK)
    return codes | {key + SCALE: gradient.new_zeros(num_blocks) for key in SIGNED}


@contextlib.contextmanager
def opened(states: Sequence[Mapping]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield first and second moments of several weights, each `(k,)`, to be changed in place.

    Those in eight bits are unpacked together, and packed again unless an error strikes.
    """
    by_device = {}
    for state in filter(_is_packed, states):
        by_device.setdefault(state["exp_avg"].device, []).append(state)
    flat = [(group, key, _unpacked(group, key)) for group in by_device.values() for key in SIGNED]
    parts = {
        (id(state), key): moment
        for group, key, values in flat
        for state, moment in zip(group, _parts(values, group), strict=True)
    }
    yield tuple([parts.get((id(state), key), state[key]) for state in states] for key in SIGNED)
    for group, key, values in flat:
        _pack_(group, key, values)


def part(state: Mapping[str, Tensor], mark: Tensor) -> dict[str, Tensor]:
    """Return the moments of the entries marked, bool `(k,)`."""
    floats = {key: _floats(state, key)[mark] for key in SIGNED}
    return _kept(floats, "8bit" if _is_packed(state) else "fp32")


def restored(saved: Mapping[str, Tensor], leaf: Tensor, kind: str) -> dict[str, Tensor]:
    """Copy the moments of a saved state to where the leaf is, in the way asked for.

    Args:
        saved: Of `len(leaf)` weights, kept in either way.
        leaf: Shape `(k,)`.
        kind: One of `KINDS`.
    """
    if _is_packed(saved) and kind == "8bit":
        keys = (*SIGNED, *(key + SCALE for key in SIGNED))
        return {key: saved[key].to(leaf.device, copy=True) for key in keys}
    floats = {key: _floats(saved, key).to(leaf.device, leaf.dtype, copy=True) for key in SIGNED}
    return _kept(floats, kind)


def is_sound(saved: Mapping[str, Tensor], count: int) -> bool:
    """Tell whether a saved state holds moments of `count` weights."""
    shapes = {key: (count,) for key in SIGNED}
    if _is_packed(saved):
        shapes |= {key + SCALE: (-(-count // BLOCK),) for key in SIGNED}
    return all(key in saved and saved[key].shape == shape for key, shape in shapes.items())


def _is_packed(state: Mapping[str, Tensor]) -> bool:
    return "exp_avg" + SCALE in state


def _kept(floats: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    state = zeros(floats["exp_avg"], kind)
    with opened([state]) as moments:
        for (moment,), values in zip(moments, floats.values(), strict=True):
            moment.copy_(values)
    return state


def _floats(state: Mapping[str, Tensor], key: str) -> Tensor:
    if not _is_packed(state):
        return state[key]
    return _parts(_unpacked([state], key), [state])[0]


def _parts(flat: Tensor, states: Sequence[Mapping]) -> list[Tensor]:
    """Split what `_unpacked` returned, or its codes, by state."""
    sizes = [BLOCK * len(state["exp_avg" + SCALE]) for state in states]
    split = flat.split(sizes)
    return [values[: len(s["exp_avg"])] for values, s in zip(split, states, strict=True)]


def _unpacked(states: Sequence[Mapping], key: str) -> Tensor:
    """Return moments of several states, one after the other, each filled up to whole blocks."""
    scale = torch.cat([state[key + SCALE] for state in states])
    values, _, zero = _map(SIGNED[key], scale.device)
    flat = torch.full((len(scale) * BLOCK,), zero, dtype=torch.uint8, device=scale.device)
    torch._foreach_copy_(_parts(flat, states), [state[key] for state in states])
    flat = values.index_select(0, flat.int())
    flat.view(-1, BLOCK).mul_(scale[:, None])
    return flat if SIGNED[key] else flat.square_()


def _pack_(states: Sequence[Mapping], key: str, flat: Tensor) -> None:
    blocks = (flat if SIGNED[key] else flat.sqrt_()).view(-1, BLOCK)
    values, codes, _ = _map(SIGNED[key], flat.device)
    scale = blocks.amax(1)
    if SIGNED[key]:  # the map ends at 1 and, on the other side, a little before -1
        scale = torch.maximum(scale, blocks.amin(1) / values[0])
    blocks /= scale.clamp(min=torch.finfo(scale.dtype).tiny)[:, None]
    bits = flat.half().view(torch.int16).int()
    bits += len(codes) // 2
    codes = codes.index_select(0, bits)
    torch._foreach_copy_([state[key] for state in states], _parts(codes, states))
    sizes = [len(state[key + SCALE]) for state in states]
    torch._foreach_copy_([state[key + SCALE] for state in states], list(scale.split(sizes)))


@functools.lru_cache
def _map(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return the value of each code `(256,)`, the code of each float16 `(65536,)` and that of zero.

    The second is indexed by a number's bits, as an int16 counted from the least.
    """
    try:
        from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap
    except ImportError as error:
        raise ImportError(
            "moments in 8 bits need the package torchao, 0.9 or later, which cannot be imported "
            f"({error}); install it (pip install torchao), or choose fp32"
        ) from error
    map_ = create_dynamic_map(signed=signed)
    values = torch.tensor(map_)
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    codes = quantize_8bit_with_qmap(halves.view(torch.float16).float(), values)
    return values.to(device), codes.to(device), map_.index(0)
