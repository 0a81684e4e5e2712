"""ComfyUI's fast operations as gradients need them."""

import contextlib
import importlib
from collections.abc import Iterator
from unittest import mock

import comfy.quant_ops
import torch

PLAIN = ("rope", "adaln")  # rooms of comfy_kitchen's operations in plain torch that models use


@contextlib.contextmanager
def differentiable_operations() -> Iterator[None]:
    """Have plain torch stand in for comfy_kitchen's operations, through which no gradient passes.

    Most models leave them out themselves while ComfyUI trains, some (Cosmos-Predict2, Anima) do not.
    """
    kitchen = getattr(comfy.quant_ops, "ck", None)
    with contextlib.ExitStack() as stack:
        for name, function in _plain(kitchen).items():
            stack.enter_context(mock.patch.object(kitchen, name, function))
        yield


def _plain(kitchen) -> dict:
    """Return plain operations that change none of their arguments, by name; none without comfy_kitchen."""
    found = {}
    for room in PLAIN if kitchen is not None else ():
        try:
            module = importlib.import_module(f"{kitchen.__name__}.backends.eager.{room}")
        except ImportError:  # an older or a newer one
            continue
        found |= {
            name: function
            for name, function in vars(module).items()
            if callable(function) and not name.startswith("_") and not name.endswith("_")
            and getattr(function, "__module__", "") == module.__name__ and hasattr(kitchen, name)
        }  # fmt: skip
    return found


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
