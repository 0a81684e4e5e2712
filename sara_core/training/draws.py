"""The batches of a run's updates: drawn one after the other, each gone over by all processes together."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .batches import BatchOrder
from .config import TrainConfig
from .noise_tally import NoiseTally
from .passes import Passes
from .processes import Processes
from .task import TrainingTask


class Draws:
    """Draws batches, and adds up the gradient of this process's share of them.

    Every process draws all of a batch, from a generator of its own, seeded with `config.seed`.

    Args:
        task: Model and pictures.
        config: How many pictures are in a batch of one process, and how many batches in an update.
        passes: Ask the model.
        processes: Those that train together.

    Attributes:
        batch_size: Pictures of a batch, in all of them.
    """

    def __init__(
        self, task: TrainingTask, config: TrainConfig, passes: Passes, processes: Processes
    ):
        self._task, self._config, self._passes, self._processes = task, config, passes, processes
        self._generator = torch.Generator().manual_seed(config.seed)
        self.set_batches(config.batch_size * processes.size)

    def set_batches(self, size: int) -> None:
        """Begin anew with batches of so many pictures, of all processes together."""
        self.batch_size, task = size, self._task
        self._orders = [BatchOrder(task.keys, size, self._generator, task.training)]
        if task.regularisation and self._config.regularisation_weight:
            self._orders.append(BatchOrder(task.keys, size, self._generator, task.regularisation))

    def seed(self, seed: int) -> None:
        """Go on with other random numbers."""
        self._generator.manual_seed(seed)

    def mark(self) -> tuple[Tensor, list]:
        """Return where the drawing is: the generator's state, and the batches left of each order's epoch."""
        return self._generator.get_state(), [order.remaining for order in self._orders]

    def go_to(self, generator: Tensor, remaining: list) -> None:
        """Go on from what `mark` returned, with the same pictures."""
        for order, batches in zip(self._orders, remaining, strict=True):
            order.remaining = [list(batch) for batch in batches]
        self._generator.set_state(generator)

    def refuse_others(self, remaining: list) -> None:
        """Refuse what `mark` returned for other sets of pictures.

        Raises:
            ValueError: It is for others.
        """
        if len(remaining) != len(self._orders):
            raise ValueError(
                f"the state is of a run with {len(remaining)} sets of pictures, but there are "
                f"{len(self._orders)} here: connect regularisation pictures only if it had some"
            )

    def backward(
        self, tally: NoiseTally | None, held: Callable[[], AbstractContextManager]
    ) -> Tensor:
        """Add up the gradient of one update, which is the mean of every process's.

        Args:
            tally: Notes the losses on the training pictures.
            held: Makes a context for each pass, in which processes send nothing.

        Returns:
            This process's share of the loss on the training pictures, and of that on the
            regularisation pictures if there are any, shape `(1,)` or `(2,)`.
        """
        weights = (1.0, self._config.regularisation_weight)
        count = self._config.grad_accumulation_steps
        losses: list[list[Tensor]] = [[] for _ in self._orders]
        for _ in range(count):
            for order, weight, sums in zip(self._orders, weights, losses, strict=False):
                batch = next(order)
                mine = self._processes.share(len(batch))
                draw = self._passes.draw(batch, self._generator, True, mine)
                part = len(draw[0]) / len(batch)
                factor = weight * part / count * self._processes.size
                with held():
                    loss = self._passes.backward(
                        draw, factor, tally if order is self._orders[0] else None
                    )
                sums.append(loss * part)
        return torch.stack([torch.stack(sums).mean() for sums in losses])
