"""The small models that are trained on, as functions of latents, captions and noise.

Needs ComfyUI on the path (`COMFYUI_PATH`), whose own network classes are used.
"""

from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from ..emoji64 import BASE_STYLES, unet
from ..emoji64 import model as mmdit
from ..emoji64.model import Text, load_pictures, load_subject
from .concepts import SUBJECT

WORD = "sks"  # what captions call it by


class Base:
    """A model with its pictures.

    Args:
        pictures: File that `emoji64.pictures` wrote.

    Attributes:
        names: Concepts.
        drawn: Which of them each style draws.
    """

    channels: int

    def __init__(self, pictures):
        self.pixels, drawn, self.styles, self.names = load_pictures(pictures)
        self.drawn = {
            style: row.nonzero()[0] for style, row in zip(self.styles, drawn, strict=True)
        }
        self._add_subject(*load_subject(pictures))
        self.text = Text()

    def _add_subject(self, pixels, faces):
        """Count the subject's pictures as concepts that no other style draws."""
        known = len(self.names)
        self.names = self.names + [f"{WORD} {face}" for face in faces]
        self.styles = [*self.styles, SUBJECT]
        self.pixels = F.pad(self.pixels, (0, 0, 0, 0, 0, 0, 0, len(faces), 0, 1), value=1.0)
        self.pixels[-1, known:] = pixels
        self.drawn[SUBJECT] = np.arange(known, len(self.names))

    def pictures(self, style, concepts):
        """Pictures (n, 3, 64, 64) of concepts by number."""
        return self.pixels[self.styles.index(style), concepts]

    @lru_cache  # noqa: B019  (one base lives as long as its process)
    def _latents(self, style, concepts):
        return self.encode(self.pictures(style, list(concepts)))

    def latents(self, style, concepts):
        """The diffusion model's latents (n, channels, 8, 8) of a style's pictures."""
        return self._latents(style, tuple(int(number) for number in concepts))

    def captions(self, style, concepts):
        """Token ids (n, 77) of their captions."""
        return self.text.ids(self.prompts(style, concepts))

    def prompts(self, style, concepts):
        """Captions, `3d style, red apple`."""
        label = BASE_STYLES[0] if style == SUBJECT else style
        return [f"{label} style, {self.names[i]}" for i in concepts]

    def errors(self, model, z, ids, noise, quantiles):
        """Squared errors (n,) of the model's own prediction.

        Args:
            model: A model of this base.
            z: Latents.
            ids: Token ids of captions.
            noise: Of the latents' shape.
            quantiles: Noise levels (n,) as quantiles in (0, 1) of those the family trains at.
        """
        made, target = self.predict(model, z, ids, noise, quantiles)
        return (made - target).square().mean((1, 2, 3))

    @cached_property
    def no_caption(self):
        """Token ids (1, 77) of the empty caption."""
        return self.text.ids([""])


class Emoji64(Base):
    """Flow matching with a transformer (SD3's), at the family's own shift."""

    name, channels = "emoji64", 16

    @cached_property
    def vae(self):
        """Its VAE."""
        return mmdit.load_vae()

    def encode(self, pixels):
        """Latents of pictures."""
        return self.vae.encode(pixels)

    def decode(self, latents):
        """Pictures of latents."""
        return self.vae.decode(latents)

    def load(self):
        """A fresh copy of the model in float32."""
        return mmdit.load_denoiser()

    def predict(self, model, z, ids, noise, quantiles):
        """The velocity, and what it should be."""
        sigma = mmdit.SHIFT * quantiles / (1 + (mmdit.SHIFT - 1) * quantiles)
        s = sigma.view(-1, 1, 1, 1)
        context, pooled = self.text(ids, 16)
        made = model((1 - s) * z + s * noise, sigma * 1000, context=context, y=pooled)
        return made, noise - z

    def sample(self, model, prompts, seed):
        """Latents of prompts."""
        return mmdit.sample(prompts, seed, steps=20, cfg=2.0, model=model)


class Emoji64Unet(Base):
    """Epsilon prediction with a UNet (SD1.5's)."""

    name, channels = "emoji64-unet", 4

    @cached_property
    def vae(self):
        """Its VAE."""
        return unet.load_vae()

    def encode(self, pixels):
        """Latents of pictures, as the diffusion model takes them."""
        return self.vae.encode(pixels) * unet.SCALE

    def decode(self, latents):
        """Pictures of latents."""
        return self.vae.decode(latents / unet.SCALE)

    def load(self):
        """A fresh copy of the model in float32."""
        return unet.load_denoiser().to(memory_format=torch.channels_last)

    def predict(self, model, z, ids, noise, quantiles):
        """The noise, and what it should be."""
        t = (quantiles * 1000).long().clamp(max=999)
        signal = unet.alphas()[t].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * z + (1 - signal).sqrt() * noise
        context = unet.normed(self.text.hidden(ids))[:, :16]
        return model(noisy, t, context=context), noise

    def sample(self, model, prompts, seed):
        """Latents of prompts."""
        return unet.sample(prompts, seed, steps=20, cfg=3.0, model=model)


BASES = {base.name: base for base in (Emoji64, Emoji64Unet)}
