"""ComfyUI's fast operations as gradients need them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.quant_ops
import torch

PLAIN = ("rope", "adaln")  # rooms of comfy_kitchen's operations in plain torch that models use


@contextlib.contextmanager
def differentiable_operations() -> Iterator[None]:
    """Have plain torch stand in for comfy_kitchen's operations, through which no gradient passes.

    Most models leave them out themselves while ComfyUI trains, some (Cosmos-Predict2, Anima) do not.
    """
    kitchen = getattr(comfy.quant_ops, "ck", None)
    with standing_in(kitchen, _plain(kitchen)):
        yield


def _plain(kitchen: Any) -> dict[str, Callable]:
    """Return plain operations that change none of their arguments, by name; none without comfy_kitchen."""
    eager = getattr(getattr(kitchen, "backends", None), "eager", None)
    rooms = [getattr(eager, room) for room in PLAIN if hasattr(eager, room)]
    return {
        name: function
        for room in rooms
        for name, function in vars(room).items()
        if callable(function) and not name.startswith("_") and not name.endswith("_")
        and getattr(function, "__module__", "") == room.__name__ and hasattr(kitchen, name)
    }  # fmt: skip


@contextlib.contextmanager
def standing_in(module: Any, functions: Mapping[str, Callable]) -> Iterator[None]:
    """Have functions stand in for those of a module that it has by their names."""
    held = {name: getattr(module, name) for name in functions if hasattr(module, name)}
    for name in held:
        setattr(module, name, functions[name])
    try:
        yield
    finally:
        for name, function in held.items():
            setattr(module, name, function)


@contextlib.contextmanager
def full_accumulation() -> Iterator[None]:
    """Have products of float16 add up in float32, though ComfyUI was started with --fast.

    Gradients of weights are sums over all pictures, under a scaled loss, and would overflow.
    """
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "allow_fp16_accumulation"):  # before torch 2.7
        yield
        return
    before = settings.allow_fp16_accumulation
    settings.allow_fp16_accumulation = False
    try:
        yield
    finally:
        settings.allow_fp16_accumulation = before
