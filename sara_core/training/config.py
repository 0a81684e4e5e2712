"""Settings of the training loop."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..optimizer.learning_rate import SCHEDULES
from .noise_levels import BY_SIZE, DISTRIBUTIONS
from .objective import LOSSES, WEIGHTINGS


def check_least(config, **least: float) -> None:
    """Refuse settings below a smallest value each, and such as are not finite."""
    for name, smallest in least.items():
        value = getattr(config, name)
        if not smallest <= value < float("inf"):
            raise ValueError(
                f"{name} is {value!r}; expected a finite number of at least {smallest}"
            )


def check_share(config, *names: str) -> None:
    """Refuse settings that are no share."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected 0 to 1")


def check_choice(config, **choices: Iterable[str]) -> None:
    """Refuse settings that are none of their choices."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(
                f"{name} is {getattr(config, name)!r}; expected one of {', '.join(known)}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """What the training loop does, apart from which weights train.

    Args:
        steps: Optimizer updates in all, at least 1.
        batch_size: Pictures in one forward pass, at least 1.
        grad_accumulation_steps: Forward passes per update, at least 1.
        lr_schedule: Course of the learning rate, one of `learning_rate.SCHEDULES`.
        warmup_steps: Updates over which it rises.
        lr_cycles: Of the course "cosine_restarts", at least 1.
        ended_at: Updates after which the run was ended before its last one; 0: it was not.
        schedule_start: Updates made before the course began: those of a run that was finished and
            then given more.
        max_grad_norm: Gradients are scaled down to this norm over all trained weights; 0 is off.
        loss_function: One of `objective.LOSSES`.
        loss_weighting: What each noise level counts, one of `objective.WEIGHTINGS`.
        snr_gamma: Of `min_snr`, above 0.
        timestep_distribution: How noise levels are drawn, one of `noise_levels.DISTRIBUTIONS`.
        logit_mean: See `NoiseLevels`.
        logit_std: See `NoiseLevels`.
        lowest_noise: See `NoiseLevels`.
        highest_noise: See `NoiseLevels`.
        flow_shift: See `NoiseLevels`.
        noise_offset: Standard deviation of noise that is the same in all of a channel, added to the
            other, so that pictures brighter and darker than most are learned; 0 is off.
        caption_dropout: Share of captions replaced by the empty one, in `[0, 1]`.
        seed: Of everything random in the run.
        regularisation_weight: Of the loss on regularisation pictures, beside 1 for the others.

    Raises:
        ValueError: A value out of range.
    """

    steps: int
    batch_size: int = 1
    grad_accumulation_steps: int = 1
    lr_schedule: str = "cosine"
    warmup_steps: int = 0
    lr_cycles: int = 3
    schedule_start: int = 0
    ended_at: int = 0
    max_grad_norm: float = 1.0
    loss_function: str = "mse"
    loss_weighting: str = "none"
    snr_gamma: float = 5.0
    timestep_distribution: str = "family"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    lowest_noise: float = 0.0
    highest_noise: float = 1.0
    flow_shift: float = 0.0
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    seed: int = 0
    regularisation_weight: float = 1.0

    def __post_init__(self):
        check_least(
            self, steps=1, batch_size=1, grad_accumulation_steps=1, warmup_steps=0,
            schedule_start=0, ended_at=0, max_grad_norm=0, seed=0, regularisation_weight=0, snr_gamma=1e-3,
            logit_mean=-10, logit_std=1e-3, noise_offset=0, lr_cycles=1, flow_shift=BY_SIZE,
        )  # fmt: skip
        if self.schedule_start >= self.steps:
            raise ValueError(f"schedule_start is {self.schedule_start}, after the last step")
        check_share(self, "caption_dropout", "lowest_noise", "highest_noise")
        if self.lowest_noise >= self.highest_noise:
            raise ValueError(
                f"lowest_noise is {self.lowest_noise!r} and highest_noise {self.highest_noise!r}; "
                "expected the lowest below the highest"
            )
        if BY_SIZE < self.flow_shift < 0:
            raise ValueError(f"flow_shift is {self.flow_shift!r}; expected -1, or at least 0")
        check_choice(
            self, lr_schedule=SCHEDULES, loss_function=LOSSES, loss_weighting=WEIGHTINGS,
            timestep_distribution=DISTRIBUTIONS,
        )  # fmt: skip

    @property
    def last_step(self) -> int:
        """Number of updates the run has when it has ended."""
        return self.ended_at or self.steps
