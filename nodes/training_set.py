"""Latents and captions as ComfyUI's nodes emit them, as a training task of the core."""

from collections.abc import Hashable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Examples:
    """What a run trains on.

    Args:
        latents: One per picture, shape `(1, C, ...)`, as the VAE encoded them.
        captions: One conditioning pair per picture.
        empty: Conditioning pair that replaces dropped captions, or None.
    """

    latents: list[Tensor]
    captions: list[list]
    empty: list | None = None


def describe_examples(examples: Examples) -> list:
    """Summarise pictures and captions, to recognise them when a run is resumed.

    Mean and deviation of each tensor: encoding again on a GPU does not give the same bits.
    """
    captions = []
    for pair in (*examples.captions, examples.empty):
        cross_attention, options = pair or (None, {})
        captions += [t for t in (cross_attention, options.get("pooled_output")) if t is not None]
    return [
        [list(t.shape), t.nan_to_num().float().mean().item(), t.nan_to_num().float().std().item()]
        for t in (*examples.latents, *captions)
    ]


def differences(saved: dict, now: dict) -> list[str]:
    """Tell what a saved run's model and examples differ in from those at hand."""
    wrong = []
    if saved["model"] != now["model"]:
        wrong.append(f"the model is of the family {now['model']}, the run's {saved['model']}")
    if saved["sampling"] != now["sampling"]:
        wrong.append(f"the sampling is {now['sampling']}, the run's {saved['sampling']}")
    old, new = saved["examples"], now["examples"]
    if len(old) != len(new):
        wrong.append(f"there are {len(new)} latents and embeddings, the run had {len(old)}")
    else:
        changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if not _alike(a, b)]
        if changed:
            wrong.append(f"{len(changed)} of {len(new)} latents and embeddings have changed")
    return wrong


def _alike(one: list, two: list) -> bool:
    (shape, *numbers), (shape2, *numbers2) = one, two
    scale = max(abs(numbers[1]), 1e-6)
    near = all(abs(a - b) <= 0.01 * scale for a, b in zip(numbers, numbers2, strict=True))
    return list(shape) == list(shape2) and near


class TrainingSet:
    """Pictures with their captions, ready for `sara_core.trainer.TrainingRun`.

    Args:
        encoder: Turns latents and captions into what the model takes.
        examples: Pictures and captions.
    """

    def __init__(self, encoder: "host.ModelCalls", examples: Examples):
        empty = examples.empty
        self.encoder = encoder
        self.schedule: NoiseSchedule = encoder.schedule
        self._latents = [encoder.prepare_latent(latent) for latent in examples.latents]
        self._captions = encoder.encode_captions(examples.captions, self._latents)
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
