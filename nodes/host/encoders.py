"""VAE and CLIP."""

import comfy.model_management
import torch
from comfyui_version import __version__
from torch import Tensor

from ...sara_core.pictures.encoding_cache import weights_digest


def compression(vae) -> int:
    """Return how many pixels of a side go into one latent value."""
    ratio = vae.spacial_compression_encode()
    return int(ratio[-1] if isinstance(ratio, (tuple, list)) else ratio)


def vae_facts(vae) -> list | None:
    """Say what an encoding by this VAE depends on; None if that is unknown."""
    model = vae.first_stage_model
    if vae.patcher.patches:
        return None
    comfy.model_management.load_models_gpu([vae.patcher])
    return [
        __version__,
        type(model).__name__,
        str(vae.vae_dtype),
        weights_digest(_tensors(model)),
    ]


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; `state_dict` of ComfyUI-GGUF's layers has no numbers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def clip_facts(clip) -> list | None:
    """Say what an encoding by this CLIP depends on; None if it carries patches or hooks."""
    if clip.patcher.patches or clip.patcher.forced_hooks is not None:
        return None
    clip.load_model()  # puts back what a patched clone may have left in the weights
    model, tokenizer = clip.cond_stage_model, clip.tokenizer
    options = sorted((str(k), str(v)) for k, v in clip.tokenizer_options.items())
    names = [__version__, type(model).__name__, type(tokenizer).__name__]
    return [*names, str(clip.layer_idx), options, weights_digest(_tensors(model))]


def frames_taken(vae, count: int) -> int:
    """Return the most frames up to a count that a VAE encodes without leaving any out.

    Raises:
        ValueError: It encodes pictures only.
    """
    down, up = vae.downscale_ratio, vae.upscale_ratio
    if vae.latent_dim != 3 or vae.not_video or not isinstance(down, tuple) or not callable(down[0]):
        raise ValueError(
            "this VAE encodes pictures, not videos; connect the one of a video model such as Wan, LTX-Video or "
            "HunyuanVideo"
        )
    return next((n for n in range(count, 0, -1) if up[0](down[0](n)) == n), 1)


def encode_pixels(vae, pixels: Tensor) -> Tensor:
    """Encode one picture, `(1, H, W, 3)` in `[0, 1]`, or one video's frames. Returns its latent, batch first.

    One at a time, as video VAEs take a batch for frames.
    """
    return vae.encode(pixels)


def encode_text(clip, text: str, weights: bool = False) -> list:
    """Encode a caption. Returns a CONDITIONING.

    Args:
        clip: The CLIP.
        text: The caption.
        weights: Whether parentheses are ComfyUI's emphasis, as `(cat:1.2)`, or just parentheses.
    """
    return clip.encode_from_tokens_scheduled(clip.tokenize(text, disable_weights=not weights))
