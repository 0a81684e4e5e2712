"""What is known of a MODEL's family: the size it was trained at, and whether it needs no guidance."""

import comfy.sample
import torch

from .schedules import noise_schedule

# Side of a square of the area that a family's own training ended with; by the names of
# comfy.supported_models, a subclass takes its parent's.
SIDES = {
    "SD15": 512,
    "SVD_img2vid": 768,
    "SV3D_u": 576,
    "Stable_Zero123": 256,
    "GenmoMochi": 640,
    "LTXV": 608,
    "HunyuanVideo": 720,
    "HunyuanImage21": 2048,
    "CosmosT2V": 944,
    "CosmosT2IPredict2": 1024,
    "WAN21_T2V": 640,
    "QwenImage": 1328,
}
USUAL_SIDE = 1024  # SDXL, SD3, Flux and those after


def trained_side(patcher) -> int:
    """Return the side in pixels of a square of the area that a model was trained at."""
    names = [cls.__name__ for cls in type(patcher.model.model_config).__mro__]
    if "SD20" in names:
        return 768 if noise_schedule(patcher).prediction == "v" else 512
    return next((SIDES[name] for name in names if name in SIDES), USUAL_SIDE)


def takes_guidance(patcher) -> bool:
    """Tell whether a model is given a guidance value, which it was distilled with, such as Flux dev."""
    return bool(patcher.model.model_config.unet_config.get("guidance_embed"))


def is_guidance_distilled(patcher) -> bool:
    """Tell whether a model was distilled to need no classifier-free guidance, such as Flux."""
    name = type(patcher.model.model_config).__name__
    return takes_guidance(patcher) or name == "FluxSchnell"


def empty_latent(patcher, compression: int) -> torch.Tensor:
    """Return an empty latent of one picture at the size a model was trained at.

    Args:
        patcher: The MODEL.
        compression: Pixels of a side that go into one latent value.
    """
    side = max(1, trained_side(patcher) // (2 * compression)) * 2  # patches span two
    return comfy.sample.fix_empty_latent_channels(patcher, torch.zeros(1, 4, side, side))
