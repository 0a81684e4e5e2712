"""Settings of a training run."""

from dataclasses import dataclass

from ..optimizer.learning_rate import SCHEDULES
from .objective import LOSSES


@dataclass(frozen=True)
class TrainConfig:
    """What a run does, apart from which weights train.

    Args:
        steps: Optimizer updates, at least 1.
        batch_size: Pictures in one forward pass, at least 1.
        accumulation: Forward passes per update, at least 1.
        schedule: Course of the learning rate, one of `learning_rate.SCHEDULES`.
        warmup_steps: Updates over which it rises.
        max_grad_norm: Gradients are scaled down to this norm over all trained weights; 0 is off.
        loss: One of `objective.LOSSES`.
        caption_dropout: Share of captions replaced by the empty one, in `[0, 1]`.
        seed: Of everything random in the run.
        regularisation_weight: Of the loss on regularisation pictures, beside 1 for the others.

    Raises:
        ValueError: A value out of range.
    """

    steps: int
    batch_size: int = 1
    accumulation: int = 1
    schedule: str = "cosine"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    loss: str = "mse"
    caption_dropout: float = 0.0
    seed: int = 0
    regularisation_weight: float = 1.0

    def __post_init__(self):
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulation", 1),
                            ("warmup_steps", 0), ("max_grad_norm", 0), ("seed", 0),
                            ("regularisation_weight", 0)):  # fmt: skip
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise ValueError(
                    f"{name} is {value!r}; expected a finite number of at least {least}"
                )
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is {self.caption_dropout!r}; expected 0 to 1")
        for name, choices in (("schedule", SCHEDULES), ("loss", tuple(LOSSES))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}"
                )
