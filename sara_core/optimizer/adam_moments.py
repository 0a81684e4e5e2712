"""AdamW's two moments of the trained weights: in float32, or in eight bits each.

Two things differ from other optimizers in eight bits, measured in docs/cost.md:

- Of the second moment the root is stored. The moment itself becomes zero where a gradient is less than
  some 4e-4 of the largest of its block, and the update, which is divided by it, hundreds of times too
  large.
- A number is rounded up as often as it lies near the upper code. The nearest code would stay the same for
  ever where a step changes the moment by less than half the distance to the next, as the second moment's
  decay rate of 0.999 mostly does.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .eight_bits import BLOCK, chances, code_of_zero, pack_, refuse_missing_torchao, unpack

BYTES = {"fp32": 8, "8bit": 2}  # of both moments of a weight, by their precision
KINDS = tuple(BYTES)
SIGNED = {"exp_avg": True, "exp_avg_sq": False}
STRIDES = {"exp_avg": 0.7548776662, "exp_avg_sq": 0.569840291}  # of the R2 sequence in a plane
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
        refuse_missing_torchao()


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
    by_device: dict[torch.device, list[Mapping]] = {}
    for state in filter(is_packed, states):
        by_device.setdefault(state["exp_avg"].device, []).append(state)
    flat = [(group, key, _unpacked(group, key)) for group in by_device.values() for key in SIGNED]
    parts = {
        (id(state), key): moment
        for group, key, values in flat
        for state, moment in zip(group, _parts(values, group), strict=True)
    }
    first, second = (
        [parts.get((id(state), key), state[key]) for state in states] for key in SIGNED
    )
    yield first, second
    for group, key, values in flat:
        _pack_(group, key, values, step)


def part(state: Mapping[str, Tensor], mark: Tensor) -> dict[str, Tensor]:
    """Return the moments of the entries marked, bool `(k,)`."""
    marked = {key: values[mark] for key, values in floats(state).items()}
    return _kept(marked, "8bit" if is_packed(state) else "fp32")


def restored(
    saved: Mapping[str, Tensor], leaf: Tensor, kind: str, entries: slice
) -> dict[str, Tensor]:
    """Copy the moments of a saved state to where the leaf is, in the way asked for.

    Args:
        saved: Kept in either way.
        leaf: Shape `(k,)`.
        kind: One of `KINDS`.
        entries: Which of the saved weights the leaf has.
    """
    is_all = entries == slice(0, len(saved["exp_avg"]))
    if is_packed(saved) and kind == "8bit" and is_all:
        keys = (*SIGNED, *(key + SCALE for key in SIGNED))
        return {key: saved[key].to(leaf.device, copy=True) for key in keys}
    found = {
        key: values[entries].to(leaf.device, leaf.dtype, copy=True)
        for key, values in floats(saved).items()
    }
    return _kept(found, kind)


def is_sound(saved: Mapping[str, Tensor], count: int) -> bool:
    """Tell whether a saved state holds moments of `count` weights."""
    shapes = {key: (count,) for key in SIGNED}
    if is_packed(saved):
        shapes |= {key + SCALE: (-(-count // BLOCK),) for key in SIGNED}
    are_there = all(key in saved and saved[key].shape == shape for key, shape in shapes.items())
    return are_there and "step" in saved


def is_packed(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a weight's moments are in eight bits."""
    return "exp_avg" + SCALE in state


def _kept(moments: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    state = zeros(moments["exp_avg"], kind)
    with opened([state]) as kept:
        for (moment,), values in zip(kept, moments.values(), strict=True):
            moment.copy_(values)
    return state


def floats(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the moments as floats, `(k,)` each, those kept as such without a copy."""
    if not is_packed(state):
        return {key: state[key] for key in SIGNED}
    return {key: _parts(_unpacked([state], key), [state])[0] for key in SIGNED}


def _parts(flat: Tensor, states: Sequence[Mapping]) -> list[Tensor]:
    """Split what `_unpacked` returned, or its codes, by state."""
    sizes = [BLOCK * len(state["exp_avg" + SCALE]) for state in states]
    split = flat.split(sizes)
    return [values[: len(s["exp_avg"])] for values, s in zip(split, states, strict=True)]


def _unpacked(states: Sequence[Mapping], key: str) -> Tensor:
    """Return moments of several states, one after the other, each filled up to whole blocks."""
    signed, scale = SIGNED[key], torch.cat([state[key + SCALE] for state in states])
    codes = scale.new_full((len(scale) * BLOCK,), code_of_zero(signed), dtype=torch.uint8)
    torch._foreach_copy_(_parts(codes, states), [state[key] for state in states])
    numbers = unpack(codes, scale, signed)
    return numbers if signed else numbers.square_()


def _pack_(states: Sequence[Mapping], key: str, flat: Tensor, step: int | None) -> None:
    signed = SIGNED[key]
    up = 0.5 if step is None else chances(step * STRIDES[key] % 1, flat.device)
    codes, scale = pack_(flat if signed else flat.sqrt_(), signed, up)
    torch._foreach_copy_([state[key] for state in states], _parts(codes, states))
    sizes = [len(state[key + SCALE]) for state in states]
    torch._foreach_copy_([state[key + SCALE] for state in states], list(scale.split(sizes)))
