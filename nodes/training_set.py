"""Latents and captions as ComfyUI's nodes emit them, as a training task of the core."""

from collections.abc import Hashable

import torch
from torch import Tensor

from ..sara_core.objective import NoiseSchedule
from . import host


def flatten_latents(latents: list[dict]) -> list[Tensor]:
    """Split LATENT inputs, single or batched, into latents of shape `(1, C, ...)`."""
    return [sample[None] for latent in latents for sample in latent["samples"]]


def flatten_conditioning(conditioning: list[list], count: int) -> list[list]:
    """Give each of `count` pictures its conditioning: one `[cross_attention, options]` pair.

    Raises:
        ValueError: Neither one conditioning in all nor one per picture.
    """
    pairs = [pair for entry in conditioning for pair in entry]
    if len(pairs) == 1:
        pairs = pairs * count
    if len(pairs) != count:
        raise ValueError(
            f"{count} pictures but {len(pairs)} captions are connected; SaRA Train needs one "
            "caption for each picture, or a single one for all"
        )
    return pairs


class TrainingSet:
    """Pictures with their captions, ready for `sara_core.trainer.train`.

    Args:
        encoder: Turns latents and captions into what the model takes.
        latents: One per picture, shape `(1, C, ...)`, as the VAE encoded them.
        captions: One conditioning pair per picture.
        empty: Conditioning pair that replaces dropped captions.
    """

    def __init__(
        self,
        encoder: "host.ModelCalls",
        latents: list[Tensor],
        captions: list[list],
        empty: list | None,
    ):
        self.encoder = encoder
        self.schedule: NoiseSchedule = encoder.schedule
        self._latents = [encoder.prepare_latent(latent) for latent in latents]
        self._captions = encoder.encode_captions(captions, self._latents)
        self._empty: dict[Hashable, dict] = {}
        for latent in self._latents if empty is not None else ():
            if latent.shape not in self._empty:
                self._empty[latent.shape] = encoder.encode_captions([empty], [latent])[0]
        self.keys = [tuple(latent.shape) for latent in self._latents]

    def latents(self, pictures: list[int]) -> Tensor:
        """Return the latents of pictures of one size, `(B, C, ...)`, float32, on the device."""
        return torch.cat([self._latents[i] for i in pictures]).to(self.encoder.device)

    def predict(
        self, noisy: Tensor, sigma: Tensor, pictures: list[int], dropped: list[bool]
    ) -> Tensor:
        """Estimate the clean latents, each picture with its own caption and noise level."""
        captions = [
            self._empty[self._latents[i].shape] if drop else self._captions[i]
            for i, drop in zip(pictures, dropped, strict=True)
        ]
        return self.encoder.denoise(noisy, sigma, captions)
