"""Pictures and captions as a training task of the core."""

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sara_core.training.objective import NoiseSchedule
from ...sara_core.weights.to_device import send
from .. import host
from .examples import Examples, split_validation, with_options


class TrainingSet:
    """Pictures with their captions, ready for `sara_core.training.trainer.TrainingRun`.

    Args:
        encoder: Turns latents and captions into what the model takes.
        examples: Pictures and captions.
        validation_split: Share of the pictures to hold out.
        seed: Of that choice.
    """

    def __init__(
        self,
        encoder: "host.ModelCalls",
        examples: Examples,
        validation_split: float = 0.0,
        seed: int = 0,
    ):
        self.encoder = encoder
        self.schedule: NoiseSchedule = encoder.schedule
        prepared: dict[tuple, Tensor] = {}  # repeats share theirs
        for latent in examples.latents:
            which = latent.data_ptr(), latent.shape
            if which not in prepared:
                prepared[which] = encoder.prepare_latent(latent)
        self._latents = [prepared[latent.data_ptr(), latent.shape] for latent in examples.latents]
        self._captions = self._encoded(examples)
        self._empty = self._encoded_empty(examples)
        self.keys = [tuple(latent.shape) for latent in self._latents]
        self.training, self.validation = split_validation(examples, validation_split, seed)
        self.regularisation = range(examples.num_to_learn, len(self._latents))
        self._masks = [
            _at_size(mask, latent)
            for mask, latent in zip(examples.masks or (), self._latents, strict=False)
        ]

    def _encoded(self, examples: Examples) -> list[list[dict]]:
        """Encode the captions of each picture: what it is measured with, and what is drawn from."""
        pairs = [
            [caption, *drawn]
            for caption, drawn in zip(examples.captions, examples.drawn, strict=True)
        ]
        latents = [latent for latent, own in zip(self._latents, pairs, strict=True) for _ in own]
        encoded = iter(
            self.encoder.encode_captions([pair for own in pairs for pair in own], latents)
        )
        return [[next(encoded) for _ in own] for own in pairs]

    def _encoded_empty(self, examples: Examples) -> list[dict]:
        """Encode the empty caption of each picture, once for those of one size that carry nothing else."""
        if examples.empty is None:
            return []
        pairs: dict[Hashable, tuple[list, Tensor]] = {}
        which: list[Hashable] = []
        for caption, latent in zip(examples.captions, self._latents, strict=True):
            pair = with_options(examples.empty, caption[1])
            key = latent.shape, None if pair is examples.empty else id(caption[1])
            which.append(key)
            pairs.setdefault(key, (pair, latent))
        encoded = self.encoder.encode_captions(*map(list, zip(*pairs.values(), strict=True)))
        found = dict(zip(pairs, encoded, strict=True))
        return [found[key] for key in which]

    def captions_to_learn(self, picture: int) -> range:
        """Return the numbers of the captions that are drawn from when a picture is learned."""
        count = len(self._captions[picture])
        return range(1, count) if count > 1 else range(1)

    def longest_caption(self, picture: int) -> int:
        """Return the number of the picture's caption that takes most memory."""
        sizes = [host.size_of(caption) for caption in self._captions[picture]]
        return sizes.index(max(sizes))

    def latents(self, pictures: list[int]) -> Tensor:
        """Return the latents of pictures of one size, `(B, C, ...)`, float32, on the device."""
        return send(torch.cat([self._latents[i] for i in pictures]), self.encoder.device)

    def mask(self, pictures: list[int]) -> Tensor | None:
        """Return what counts in the loss, `(B, 1, ..., h, w)`; regularisation pictures count whole."""
        if not self._masks:
            return None
        masks = [
            self._masks[i] if i < len(self._masks) else torch.ones_like(self._latents[i][:, :1])
            for i in pictures
        ]
        return send(torch.cat(masks), self.encoder.device)

    def predict(
        self, noisy: Tensor, sigma: Tensor, pictures: list[int], captions: list[int | None]
    ) -> Tensor:
        """Estimate the clean latents, each picture with its own caption and noise level.

        Raises:
            Exception: ComfyUI's interrupt, if the user has pressed Cancel.
        """
        host.check_cancelled()
        encoded = [
            self._empty[i] if number is None else self._captions[i][number]
            for i, number in zip(pictures, captions, strict=True)
        ]
        return self.encoder.denoise(noisy, sigma, encoded)


def _at_size(mask: Tensor, latent: Tensor) -> Tensor:
    """Average a mask `(1, H, W)` to a latent's size, `(1, 1, ..., h, w)` or `(1, 1, length)`, float32, on the CPU."""
    size = latent.shape[2:][-2:]
    flat = size if len(size) == 2 else (1, *size)
    small = F.interpolate(mask[None].clone().float().cpu(), flat, mode="area")
    return small.reshape(1, 1, *[1] * (latent.dim() - 2 - len(size)), *size)
