"""Attention that gradients pass through, whatever kernels ComfyUI was started with."""

import contextlib
import logging
from collections.abc import Iterator

import comfy.ldm.modules.attention as attention
import comfy.ops
from torch import Tensor

from .operations import standing_in

# In `transformer_options`: what is called in place of ComfyUI's attention.
OVERRIDE = "optimized_attention_override"
INFERENCE_ONLY = {
    "attention_sage", "attention3_sage", "attention_flash", "attention_comfy_kitchen_int8",
}  # fmt: skip

logger = logging.getLogger("comfyui-sara")


def with_gradients(transformer_options: dict) -> dict:
    """Return options of a model's call in which attention is one that gradients pass through.

    What nodes have put in its place is left out, as nobody knows whether they do there.
    """
    options = {key: value for key, value in transformer_options.items() if key != OVERRIDE}
    if _is_inference_only():
        options[OVERRIDE] = _torchs
    return options


def _torchs(_, *args, **kwargs) -> Tensor:
    return attention.attention_pytorch(*args, **kwargs)


@contextlib.contextmanager
def differentiable_attention() -> Iterator[None]:
    """Have torch's attention stand in for kernels without a backward pass, also in models that know no options.

    Through SageAttention queries, keys and values silently get no gradient; FlashAttention, as ComfyUI calls
    it, fails in the backward pass. ComfyUI looks both up by these names at each call.
    """
    if _is_inference_only():
        logger.info("SaRA Train: attention is torch's, as %s has no gradients", _name())
    with standing_in(attention, KERNELS):
        yield


def _name() -> str:
    return getattr(attention.optimized_attention, "__name__", "")


def _is_inference_only() -> bool:
    return _name() in INFERENCE_ONLY


def _attend(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return comfy.ops.scaled_dot_product_attention(q, k, v, dropout_p=0.0, **options)


def _heads_last(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Attend where heads come after positions, `(n, positions, heads, size)`."""
    return _attend(*(t.transpose(1, 2) for t in (q, k, v)), **options).transpose(1, 2)


def _sage(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout="HND", is_causal=False, sm_scale=None,
    attn_mask=None, **_,
) -> Tensor:  # fmt: skip
    attend = _heads_last if tensor_layout == "NHD" else _attend
    return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=sm_scale)


def _sage3(q: Tensor, k: Tensor, v: Tensor, is_causal=False, **_) -> Tensor:
    return _attend(q, k, v, is_causal=is_causal)


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout_p=0.0, causal=False) -> Tensor:
    return _heads_last(q, k, v, is_causal=causal)


KERNELS = {"sageattn": _sage, "sageattn3_blackwell": _sage3, "flash_attn_wrapper": _flash}
