"""The training loop: draw pictures and noise, ask the model, update."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .batches import batches
from .config import TrainConfig
from .learning_rate import factor
from .objective import NoiseSchedule
from .optimizer import SaraAdamW


class TrainingTask(Protocol):
    """The model and pictures to train on, as the loop sees them."""

    schedule: NoiseSchedule
    keys: Sequence[Hashable]

    def latents(self, pictures: list[int]) -> Tensor:
        """Return clean latents of pictures with equal keys, shape `(B, ...)`, float32."""

    def predict(
        self, noisy: Tensor, sigma: Tensor, pictures: list[int], dropped: list[bool]
    ) -> Tensor:
        """Estimate the clean latents, shape of `noisy`, each picture with its own caption.

        Args:
            noisy: Shape `(B, ...)`.
            sigma: Noise level of each picture, shape `(B,)`, on the device of `noisy`.
            pictures: Number of each picture.
            dropped: Whether its caption is replaced by the empty one.
        """


@dataclass(frozen=True)
class StepReport:
    """What one update did.

    Args:
        step: Number of the update, from 1.
        loss: Mean loss over the pictures of the update, scalar, left on its device so that reading
            it is the reader's choice.
        learning_rate: Used in the update.
        stage: 1 before the progressive adjustment, 2 after.
    """

    step: int
    loss: Tensor
    learning_rate: float
    stage: int


def train(
    optimizer: SaraAdamW,
    task: TrainingTask,
    config: TrainConfig,
    scaler: torch.amp.GradScaler | None = None,
) -> Iterator[StepReport]:
    """Make `config.steps` updates, yielding a report after each.

    Every random number comes from a CPU generator seeded with `config.seed`, so a run does not
    depend on the device's generator, and the global one is not touched.

    Args:
        optimizer: Holds the weights that train; its learning rate is the peak of the schedule.
        task: Model and pictures.
        config: Settings.
        scaler: Scales the loss where gradients are float16; a step that overflows is left out.
    """
    generator = torch.Generator().manual_seed(config.seed)
    order = batches(task.keys, config.batch_size, generator)
    peak = optimizer.param_groups[0]["lr"]
    for step in range(config.steps):
        rate = peak * factor(step, config.steps, config.schedule, config.warmup_steps)
        optimizer.param_groups[0]["lr"] = rate
        losses = []
        for _ in range(config.accumulation):
            loss = _loss(task, next(order), config, generator)
            scaled = loss / config.accumulation
            (scaled if scaler is None else scaler.scale(scaled)).backward()
            losses.append(loss.detach())
        _update(optimizer, config.max_grad_norm, scaler)
        yield StepReport(step + 1, torch.stack(losses).mean(), rate, optimizer.stage)


def _loss(
    task: TrainingTask, pictures: list[int], config: TrainConfig, generator: torch.Generator
) -> Tensor:
    latents = task.latents(pictures)
    count = len(pictures)
    sigma = task.schedule.draw_sigma(count, generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    dropped = (torch.rand(count, generator=generator) < config.caption_dropout).tolist()
    noisy = task.schedule.add_noise(latents, noise, sigma)
    x0 = task.predict(noisy, sigma, pictures, dropped)
    return task.schedule.loss(x0, latents, sigma, config.loss).mean()


def _update(
    optimizer: SaraAdamW, max_grad_norm: float, scaler: torch.amp.GradScaler | None
) -> None:
    if scaler is not None:
        scaler.unscale_(optimizer)
    optimizer.add_low_rank_gradient_()
    if max_grad_norm:
        torch.nn.utils.clip_grad_norm_(optimizer.parameters(), max_grad_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
