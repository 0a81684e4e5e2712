"""What the training loop works on, and what it tells of each step."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .objective import NoiseSchedule


class TrainingTask(Protocol):
    """The model and pictures to train on, as the loop sees them.

    Args:
        keys: Bucket of each picture; only pictures with equal ones share a batch.
        training: Numbers of the pictures to learn.
        regularisation: Numbers of pictures that each step goes over as well, to keep what the model
            makes of them; may be empty.
        validation: Numbers of pictures that are held out; may be empty.
    """

    schedule: NoiseSchedule
    keys: Sequence[Hashable]
    training: Sequence[int]
    regularisation: Sequence[int]
    validation: Sequence[int]

    def latents(self, pictures: list[int]) -> Tensor:
        """Return clean latents of pictures with equal keys, shape `(B, ...)`, float32."""

    def mask(self, pictures: list[int]) -> Tensor | None:
        """Return what counts in the loss, broadcastable to the latents, or None for everything."""

    def captions_to_learn(self, picture: int) -> range:
        """Return the numbers of the captions that are drawn from when a picture is learned."""

    def longest_caption(self, picture: int) -> int:
        """Return the number of the picture's caption that takes most memory."""

    def predict(
        self, noisy: Tensor, sigma: Tensor, pictures: list[int], captions: list[int | None]
    ) -> Tensor:
        """Estimate the clean latents, shape of `noisy`, each picture with its own caption.

        Args:
            noisy: Shape `(B, ...)`.
            sigma: Noise level of each picture, shape `(B,)`, on the device of `noisy`.
            pictures: Number of each picture.
            captions: Number of each picture's caption: 0 is the one it is measured with, None the
                empty one.
        """


@dataclass(frozen=True)
class StepReport:
    """What one update did.

    Args:
        step: Number of the update, from 1.
        loss: Mean over the batches of the update, of the mean loss over the pictures of each.
        learning_rate: Used in the update.
        stage: 1 before the progressive adjustment, 2 after.
        skipped: The loss or a gradient was not finite, so nothing was updated.
        regularisation_loss: The same of the regularisation pictures, if there are any.
    """

    step: int
    loss: float
    learning_rate: float
    stage: int
    skipped: bool = False
    regularisation_loss: float | None = None
