"""emoji64-unet's parts outside ComfyUI's executor: a UNet as SD1.5's, on four channels of latents.

Needs ComfyUI on the path (`COMFYUI_PATH`), whose own network classes are used.
"""

import torch
import torch.nn.functional as F

from ..assets.emoji64.assemble import UNET, unet_state, vae_state
from .model import Text, Vae, comfy

CHANNELS, SIDE, WIDTH = 4, 8, 768
SCALE = 0.18215  # of SD1.5's latents in the diffusion model


def build():
    """The denoiser with whatever weights it is made with: SD1.5's 320 channels, on two levels."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(
        image_size=32, in_channels=CHANNELS, out_channels=CHANNELS, model_channels=320,
        channel_mult=(1, 1), num_res_blocks=[1, 1], transformer_depth=[0, 1],
        transformer_depth_output=[0, 0, 0, 1], transformer_depth_middle=-1, context_dim=WIDTH,
        num_heads=8, num_head_channels=-1, use_spatial_transformer=True,
        use_linear_in_transformer=False, legacy=False, dtype=torch.float32, device="cpu",
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip


def alphas():
    """Cumulative products of SD1.5's schedule, (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def normed(hidden):
    """SD1.5's conditioning of what the text encoder's layers put out, (n, 77, 768)."""
    return F.layer_norm(hidden, (WIDTH,))


def context(text, prompts):
    """SD1.5's conditioning of prompts, (n, 77, 768)."""
    return normed(text.hidden(text.ids(prompts)))


def load_vae():
    """The VAE in the repository; its latents are the diffusion model's divided by `SCALE`."""
    return Vae(vae_state(UNET), CHANNELS)


def load_denoiser(state=None):
    """The denoiser in the repository, or with a state of its own."""
    model = build()
    model.load_state_dict({k: v.float() for k, v in (state or unet_state()).items()})
    return model


@torch.no_grad()
def sample(prompts, seed, steps, cfg, model=None):
    """The diffusion model's latents (n, 4, 8, 8) by Euler's method, as ComfyUI's `euler` and `normal` make them."""
    model, text = model or load_denoiser(), Text()
    empty = context(text, [""])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(prompts), CHANNELS, SIDE, SIDE, generator=generator)
    levels = ((1 - alphas()) / alphas()).sqrt()
    times = torch.linspace(999, 0, steps)
    sigmas = torch.cat([interpolate(levels, times), torch.zeros(1)])
    for start in range(0, len(prompts), 64):
        rows = prompts[start : start + 64]
        z = x[start : start + 64] * (1 + sigmas[0] ** 2).sqrt()
        asked = context(text, rows)
        both_contexts = torch.cat([asked, empty.expand_as(asked)])
        for t, sigma, following in zip(times, sigmas[:-1], sigmas[1:], strict=True):
            scaled = z / (1 + sigma**2).sqrt()
            both = model(torch.cat([scaled, scaled]), t.expand(2 * len(z)), context=both_contexts)
            positive, negative = both.chunk(2)
            z = z + (following - sigma) * (negative + cfg * (positive - negative))
        x[start : start + 64] = z
    return x


def interpolate(levels, times):
    """Noise levels at fractional times, linear in the logarithm as in ComfyUI."""
    low = times.floor().long()
    high, share = times.ceil().long(), times - times.floor()
    return ((1 - share) * levels[low].log() + share * levels[high].log()).exp()
