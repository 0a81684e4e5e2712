"""Forward and backward passes over pictures, in parts where memory is short."""

import math

import torch
from torch import Tensor

from ..weights.to_device import send
from . import weight_casts
from .config import TrainConfig
from .in_place_changes import changes_allowed, changes_saved_tensors
from .noise_levels import NoiseLevels, shifted
from .noise_tally import NoiseTally
from .task import TrainingTask


class Passes:
    """Asks the model about noisy pictures, and adds up gradients of its errors.

    Args:
        task: Model and pictures.
        config: How errors are measured and weighted, and how many pictures there are in one pass.
        scaler: Scales the loss where gradients are float16.

    Attributes:
        in_place: The model changes tensors backward needs; see `look_for_in_place_changes`.
        num_parts: Of a batch, one after the other.
    """

    def __init__(
        self,
        task: TrainingTask,
        config: TrainConfig,
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.task, self._config, self._scaler = task, config, scaler
        self._most = config.batch_size
        self._levels: dict[tuple, NoiseLevels] = {}
        for to_learn in (False, True):  # what cannot be drawn is refused before the first step
            self._levels_of(task.latents([task.training[0]]).shape, to_learn)
        task.schedule.weight(torch.full((1,), 0.5), config.loss_weighting, config.snr_gamma)
        pictures = (*task.training, *task.regularisation)
        self._has_choice = any(len(task.captions_to_learn(picture)) > 1 for picture in pictures)
        self.in_place = False
        self.num_parts = 1

    def look_for_in_place_changes(self) -> None:
        """Set `in_place`, by one forward pass over one picture."""
        draw = self.draw([self.task.training[0]], torch.Generator())
        self.in_place = changes_saved_tensors(lambda: self.losses(*draw).mean())

    def draw(
        self,
        pictures: list[int],
        generator: torch.Generator,
        to_learn: bool = False,
        mine: slice = slice(None),
    ) -> tuple:
        """Draw what the model is asked about a batch, for all of its pictures.

        Args:
            pictures: The batch.
            generator: Of all that is random.
            to_learn: Draw as the run is set to; else the family's noise levels, and the captions that
                pictures are measured with.
            mine: Pictures that it is returned for.
        """
        own, count = pictures[mine], len(pictures)
        latents = self.task.latents(own or pictures[:1])
        shape = (count, *latents.shape[1:])
        sigma = self._levels_of(latents.shape, to_learn).draw(count, generator)
        noise = torch.randn(shape, generator=generator)
        dropout = self._config.caption_dropout if to_learn else 0.0
        dropped = torch.rand(count, generator=generator) < dropout
        if to_learn and self._config.noise_offset:
            offset = torch.randn((*shape[:2], *[1] * len(shape[2:])), generator=generator)
            noise.add_(offset, alpha=self._config.noise_offset)
        captions: list[int | None] = [0] * len(own)
        if to_learn:
            chosen = (
                torch.rand(count, generator=generator) if self._has_choice else torch.zeros(count)
            )
            captions = self._captions(own, dropped[mine].tolist(), chosen[mine].tolist())
        device = latents.device
        parts = send(sigma[mine], device), send(noise[mine], device)
        return own, latents[: len(own)], *parts, captions

    def _levels_of(self, shape: torch.Size, to_learn: bool) -> NoiseLevels:
        """Return what draws noise levels for latents `(B, C, ..., h, w)`; it is kept."""
        config = self._config
        area = math.prod(shape[-2:])
        shift = config.flow_shift if to_learn else 0.0
        kind = config.timestep_distribution if to_learn else "family"
        which = kind, shift, area if shift else 0
        if which not in self._levels:
            self._levels[which] = NoiseLevels(
                shifted(self.task.schedule, shift, area), kind, config.logit_mean,
                config.logit_std, config.lowest_noise, config.highest_noise,
            )  # fmt: skip
        return self._levels[which]

    def _captions(
        self, pictures: list[int], dropped: list[bool], chosen: list[float]
    ) -> list[int | None]:
        """Return the number of each picture's caption; `chosen`, in [0, 1), picks one of several."""
        drawn = [self.task.captions_to_learn(picture) for picture in pictures]
        return [
            None if drop else numbers[int(place * len(numbers))]
            for numbers, drop, place in zip(drawn, dropped, chosen, strict=True)
        ]

    def losses(self, pictures, latents, sigma, noise, captions) -> Tensor:
        """Return the loss of each picture of what `draw` returned, not weighted."""
        schedule = self.task.schedule
        noisy = schedule.add_noise(latents, noise, sigma)
        x0 = self.task.predict(noisy, sigma, pictures, captions)
        mask = self.task.mask(pictures)
        return schedule.loss(x0, latents, sigma, self._config.loss_function, mask)

    def _weighted(
        self, tally: NoiseTally | None, pictures, latents, sigma, noise, captions
    ) -> Tensor:
        losses = self.losses(pictures, latents, sigma, noise, captions)
        if tally is not None:
            tally.note(sigma, losses)
        weighting, gamma = self._config.loss_weighting, self._config.snr_gamma
        return (losses * self.task.schedule.weight(sigma, weighting, gamma)).mean()

    def total_loss(self, draw: tuple, num_parts: int) -> Tensor:
        """Return the sum of the losses of what `draw` returned, of all its pictures, in so many parts."""
        size = self._size_of_parts(len(draw[0]), num_parts)
        losses = [
            self.losses(*(part[start : start + size] for part in draw)).sum()
            for start in range(0, len(draw[0]), size)
        ]
        return torch.stack(losses).sum()

    def _size_of_parts(self, count: int, num_parts: int) -> int:
        return max(1, min(self._most, -(-count // num_parts)))

    def backward(self, draw: tuple, weight: float, tally: NoiseTally | None = None) -> Tensor:
        """Add the gradient of a batch's mean loss times a weight; returns the loss.

        Each picture's, not weighted, goes into the tally.
        """
        count, losses = len(draw[0]), [draw[2].new_zeros(())]
        if not count and self._scaler is not None:  # it finds its scale when it is first used
            self._scaler.scale(losses[0])
        size = self._size_of_parts(count, self.num_parts)
        for start in range(0, count, size):
            with changes_allowed() if self.in_place else weight_casts.recomputed():
                loss = self._weighted(tally, *(part[start : start + size] for part in draw))
                share = min(size, count - start) / count
                scaled = loss * (share * weight)
                (scaled if self._scaler is None else self._scaler.scale(scaled)).backward()
            losses.append(loss.detach() * share)
        return torch.stack(losses).sum()
