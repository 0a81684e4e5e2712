"""AdamW's two moments of the trained weights: in float32, or in eight bits each.

Eight bits are a code of torchao's dynamic map (Dettmers et al. 2021, arXiv:2110.02861) and a scale for
each 256 neighbours, by which the largest of them is kept exactly. Two things differ from other
optimizers in eight bits, measured in docs/cost.md:

- Of the second moment the root is stored. The moment itself becomes zero where a gradient is less than
  some 4e-4 of the largest of its block, and the update, which is divided by it, hundreds of times too
  large.
- A number is rounded up as often as it lies near the upper code. The nearest code would stay the same for
  ever where a step changes the moment by less than half the distance to the next, as the second moment's
  decay rate of 0.999 mostly does.
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
STRIDES = {
    "exp_avg": 0.7548776662,
    "exp_avg_sq": 0.5698402910,
}  # irrational, of a plane's R2 sequence
GOLDEN = 0.6180339887
FULL = 2.0**14  # what a code of 1 is while it is looked up: float16 is slow below 6e-5
EDGE = 1e-4  # no chance is nearer to 0 or 1, so that a code's own value always yields that code


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
def opened(
    states: Sequence[Mapping], step: int | None = None
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield first and second moments of several weights, each `(k,)`, to be changed in place.

    Those in eight bits are unpacked together, and packed again unless an error strikes.

    Args:
        states: As `zeros` makes them.
        step: Number of the step, by which it is decided what is rounded up; None takes the nearest.
    """
    by_device = {}
    for state in filter(is_packed, states):
        by_device.setdefault(state["exp_avg"].device, []).append(state)
    flat = [(group, key, _unpacked(group, key)) for group in by_device.values() for key in SIGNED]
    parts = {
        (id(state), key): moment
        for group, key, values in flat
        for state, moment in zip(group, _parts(values, group), strict=True)
    }
    yield tuple([parts.get((id(state), key), state[key]) for state in states] for key in SIGNED)
    for group, key, values in flat:
        _pack_(group, key, values, step)


def part(state: Mapping[str, Tensor], mark: Tensor) -> dict[str, Tensor]:
    """Return the moments of the entries marked, bool `(k,)`."""
    floats = {key: _floats(state, key)[mark] for key in SIGNED}
    return _kept(floats, "8bit" if is_packed(state) else "fp32")


def restored(saved: Mapping[str, Tensor], leaf: Tensor, kind: str) -> dict[str, Tensor]:
    """Copy the moments of a saved state to where the leaf is, in the way asked for.

    Args:
        saved: Of `len(leaf)` weights, kept in either way.
        leaf: Shape `(k,)`.
        kind: One of `KINDS`.
    """
    if is_packed(saved) and kind == "8bit":
        keys = (*SIGNED, *(key + SCALE for key in SIGNED))
        return {key: saved[key].to(leaf.device, copy=True) for key in keys}
    floats = {key: _floats(saved, key).to(leaf.device, leaf.dtype, copy=True) for key in SIGNED}
    return _kept(floats, kind)


def is_sound(saved: Mapping[str, Tensor], count: int) -> bool:
    """Tell whether a saved state holds moments of `count` weights."""
    shapes = {key: (count,) for key in SIGNED}
    if is_packed(saved):
        shapes |= {key + SCALE: (-(-count // BLOCK),) for key in SIGNED}
    return all(key in saved and saved[key].shape == shape for key, shape in shapes.items())


def is_packed(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a weight's moments are in eight bits."""
    return "exp_avg" + SCALE in state


def _kept(floats: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    state = zeros(floats["exp_avg"], kind)
    with opened([state]) as moments:
        for (moment,), values in zip(moments, floats.values(), strict=True):
            moment.copy_(values)
    return state


def _floats(state: Mapping[str, Tensor], key: str) -> Tensor:
    if not is_packed(state):
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
    values, *_, zero = _map(SIGNED[key], scale.device)
    flat = torch.full((len(scale) * BLOCK,), zero, dtype=torch.uint8, device=scale.device)
    torch._foreach_copy_(_parts(flat, states), [state[key] for state in states])
    flat = values.index_select(0, flat.int())
    flat.view(-1, BLOCK).mul_(scale[:, None])
    return flat if SIGNED[key] else flat.square_()


def _pack_(states: Sequence[Mapping], key: str, flat: Tensor, step: int | None) -> None:
    blocks = (flat if SIGNED[key] else flat.sqrt_()).view(-1, BLOCK)
    values, *_ = _map(SIGNED[key], flat.device)
    scale = blocks.amax(1)
    if SIGNED[key]:  # the map ends at 1 and, on the other side, a little before -1
        scale = torch.maximum(scale, blocks.amin(1) / values[0])
    blocks *= (FULL / scale.clamp(min=torch.finfo(scale.dtype).tiny * FULL))[:, None]
    codes = _rounded(blocks, key, step)
    torch._foreach_copy_([state[key] for state in states], _parts(codes, states))
    sizes = [len(state[key + SCALE]) for state in states]
    torch._foreach_copy_([state[key + SCALE] for state in states], list(scale.split(sizes)))


def _rounded(blocks: Tensor, key: str, step: int | None) -> Tensor:
    """Return the codes of numbers between -FULL and FULL, `(n, BLOCK)`, as uint8 `(n * BLOCK,)`; they are lost."""
    _, codes, slopes, _ = _map(SIGNED[key], blocks.device)
    flat = blocks.view(-1)
    halves = flat.half()
    bits = halves.view(torch.int16).int()
    bits += len(codes) // 2
    flat -= halves
    flat *= slopes.index_select(0, bits)
    flat += codes.index_select(0, bits)
    blocks += 1 - _chances(key, step, blocks.device)
    return flat.to(torch.uint8)


def _chances(key: str, step: int | None, device: torch.device) -> Tensor | float:
    """Return numbers between 0 and 1, shape `(BLOCK,)`, evenly spread over places and over steps."""
    if step is None:
        return 0.5
    chances = _places(device) + step * STRIDES[key] % 1
    return chances.remainder_(1).clamp_(EDGE, 1 - EDGE)


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
