"""The small model's parts outside ComfyUI's executor: its classes, its text as tables, a plain sampler.

Needs ComfyUI on the path (`COMFYUI_PATH`), whose own network classes are used.
"""

import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.environ["COMFYUI_PATH"])
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.ops  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import (  # noqa: E402
    OpenAISignatureMMDITWrapper,
    get_2d_sincos_pos_embed,  # noqa: F401  (for train_denoiser)
)
from comfy.sd1_clip import SDTokenizer  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402

from ..assets.emoji64.assemble import HIDDEN, clip_l, denoiser_state, vae_state  # noqa: E402

DEPTH = 4
WIDTH = 64 * DEPTH
SHIFT = 3.0  # of the family, SD3, that ComfyUI takes it for


def load_pictures(path):
    """What `pictures.py` wrote, the pictures as float32 (styles, concepts, 3, 64, 64) in `[0, 1]`."""
    data = np.load(path)
    x = torch.from_numpy(data["x"]).permute(0, 1, 4, 2, 3).float() / 255
    return (
        x,
        data["drawn"],
        list(data["styles"]),
        [str(n).replace("-", " ") for n in data["concepts"]],
    )


def load_subject(path):
    """Pictures of one subject that `pictures.py` wrote, float32 (faces, 3, 64, 64), and what each shows."""
    data = np.load(path)
    x = torch.from_numpy(data["subject"]).permute(0, 3, 1, 2).float() / 255
    return x, [str(n).replace("-", " ") for n in data["faces"]]


class Vae:
    """A small model's VAE; pictures in `[0, 1]`, latents as the diffusion model sees them."""

    def __init__(self, state, channels=16):
        self.net = TAESD(latent_channels=channels).eval().requires_grad_(False)
        self.net.load_state_dict({k: v.float() for k, v in state.items()})

    def encode(self, x):
        """Latents (n, 16, 8, 8) of pictures (n, 3, 64, 64)."""
        with torch.no_grad():
            return torch.cat([self.net.encode(part * 2 - 1) for part in x.split(64)])

    def decode(self, z):
        """Pictures (n, 3, 64, 64) of latents (n, 16, 8, 8)."""
        with torch.no_grad():
            made = torch.cat([self.net.decode(part) for part in z.split(64)])
        return (made / 2 + 0.5).clamp(0, 1)


def load_vae():
    """The VAE in the repository."""
    return Vae(vae_state())


class Text:
    """What the text encoder of `assemble.py` computes, read off its tables: it has no other parts."""

    def __init__(self):
        state = {k: v.float() for k, v in clip_l().items()}
        self.token = state["text_model.embeddings.token_embedding.weight"]
        self.position = state["text_model.embeddings.position_embedding.weight"]
        self.tokenizer = SDTokenizer()

    def ids(self, prompts):
        """Token ids (n, 77)."""
        ids = [self.tokenizer.tokenize_with_weights(prompt)[0] for prompt in prompts]
        return torch.tensor([[int(token[0]) for token in row] for row in ids])

    def hidden(self, ids):
        """What the layers put out for token ids (n, 77), (n, 77, 768), before the last norm."""
        x = self.token[ids] + self.position
        count = torch.arange(1, 78)[None, :, None]
        return x + 2.0 * F.layer_norm(x, (HIDDEN,)).cumsum(1) / count

    def __call__(self, ids, length=77):
        """SD3's conditioning of token ids (n, 77): context (n, length, 4096) and pooled (n, 2048)."""
        x = self.hidden(ids)
        end = (ids == 49407).int().argmax(-1)
        pooled = F.layer_norm(x, (HIDDEN,))[torch.arange(len(ids)), end]
        return F.pad(x[:, :length], (0, 4096 - HIDDEN)), F.pad(pooled, (0, 2048 - HIDDEN))


def build():
    """The denoiser with whatever weights it is made with."""
    return OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=16, depth=DEPTH, adm_in_channels=2048,
        qk_norm="rms", pos_embed_max_size=16, num_patches=256, pos_embed_scaling_factor=None,
        context_embedder_config={
            "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": WIDTH},
        },
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip


def load_denoiser(state=None):
    """The denoiser in the repository, or with a state of its own."""
    model = build()
    model.load_state_dict({k: v.float() for k, v in (state or denoiser_state()).items()})
    return model


@torch.no_grad()
def sample(prompts, seed, steps, cfg, model=None, shift=SHIFT):
    """Latents (n, 16, 8, 8) by Euler's method, as ComfyUI's `euler` and `simple` make them."""
    model, text = model or load_denoiser(), Text()
    empty = text(text.ids([""]))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(prompts), 16, 8, 8, generator=generator)
    times = torch.linspace(1, 0, steps + 1)
    sigmas = shift * times / (1 + (shift - 1) * times)
    for start in range(0, len(prompts), 64):
        z, rows = x[start : start + 64], prompts[start : start + 64]
        conditioning = [
            torch.cat([a, b.expand_as(a)]) for a, b in zip(text(text.ids(rows)), empty, strict=True)
        ]
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            t = torch.full((2 * len(z),), float(sigma * 1000))
            both = model(torch.cat([z, z]), t, context=conditioning[0], y=conditioning[1])
            positive, negative = both.chunk(2)
            z = z + (following - sigma) * (negative + cfg * (positive - negative))
        x[start : start + 64] = z
    return x
