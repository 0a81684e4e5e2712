"""Choose the weights that train by what a run's pictures say of them, before its first step."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..optimizer.gradient_selection import SUM, NotFinite, select_by_gradient
from ..weights.parameters import choose_parameters
from ..weights.selection import Selection
from .batches import BatchOrder
from .config import TrainConfig
from .out_of_memory import is_out_of_memory
from .passes import Passes
from .processes import FINE, NO_MEMORY, Processes
from .task import TrainingTask

logger = logging.getLogger("comfyui-sara")

TO_LEARN, TO_KEEP = (
    64,
    128,
)  # pictures that are gone over at least, each at a noise level of its own
TRAINED = 17  # bytes of a trained weight in training
FIRST_SCALE = 2.0**16  # of losses, where gradients are float16


class Choosing:
    """Chooses weights by gradients of a run's own loss, see `select_by_gradient`.

    Regularisation pictures, if there are any, are what the model is to keep. Every process goes over its
    share of each batch, and all choose the same. Where memory runs out in one, all go on in parts.
    All that is random comes from `config.seed`.

    Args:
        task: Model and pictures.
        config: How errors are measured, and how many pictures are in a batch of one process.
        passes: Ask the model.
        processes: Those that train together.
        free_memory: Called before it is tried again after memory has run out.
        passed: Called after each pass of this process; about `num_passes` for each part of the model.
    """

    def __init__(
        self,
        task: TrainingTask,
        config: TrainConfig,
        passes: Passes,
        processes: Processes,
        free_memory: Callable[[], None] = lambda: None,
        passed: Callable[[], None] = lambda: None,
    ):
        self._task, self._config, self._passes = task, config, passes
        self._processes, self._free_memory, self._passed = processes, free_memory, passed
        self._scale, self._most_bytes, self._is_learning = 1.0, 0.0, False

    @property
    def num_passes(self) -> int:
        """Passes of this process for each part of the model, or some more where pictures differ in size."""
        size = self._processes.size
        kept = -(-TO_KEEP // size) if self._task.regularisation else 0
        return -(-TO_LEARN // (self._config.batch_size * size)) + kept

    def choose(
        self,
        module: nn.Module,
        fraction: float,
        is_float16: bool = False,
        most_bytes: float = 0,
        **options,
    ) -> Selection:
        """Choose weights.

        Args:
            module: The model.
            fraction: Of the weights.
            is_float16: Gradients are, so that losses have to be scaled up.
            most_bytes: What may be taken beside the model and activations, the least of all processes'; what the weights
                that are chosen will take in training if that is more. Where memory runs out, less is taken.
            options: Others of `select_by_gradient`.

        Raises:
            Exception: As of `select_by_gradient`, and what the model raises.
        """
        self._scale = FIRST_SCALE if is_float16 else 1.0
        parameters = choose_parameters(module, options.get("include"), options.get("exclude"))
        sizes = [parameter.numel() for parameter in parameters.values()]
        least = max(most_bytes, TRAINED * fraction * sum(sizes))
        self._most_bytes = min(self._processes.gather(lambda: least))
        while True:
            try:
                return select_by_gradient(
                    module,
                    self._learn,
                    self._keep if self._task.regularisation else None,
                    fraction=fraction,
                    most_bytes=self._most_bytes,
                    together=self._together,
                    distributed=self._processes.size > 1,
                    **options,
                )
            except Exception as error:
                if not self._can_ease(error, SUM * max(sizes)):
                    raise
            self._free_memory()  # outside the except block, where the error held on to tensors

    def _can_ease(self, error: Exception, least_bytes: int) -> bool:
        """Make it easier after an error that has struck in all processes, if that helps."""
        if isinstance(error, NotFinite) and self._scale > 1:
            self._scale /= 16
            return True
        if not is_out_of_memory(error):
            return False
        in_parts = self._is_learning and self._passes.num_parts < self._config.batch_size
        if in_parts:
            self._passes.num_parts = min(2 * self._passes.num_parts, self._config.batch_size)
        in_more = self._most_bytes > least_bytes
        if in_more:
            self._most_bytes /= 2
        logger.warning(
            "memory ran out while weights were chosen; %s",
            "trying again with less at a time"
            if in_parts or in_more
            else "not even one picture fits",
        )
        return in_parts or in_more

    def _learn(self) -> None:
        """Make passes over batches of what is to be learned."""
        self._is_learning = True
        generator = torch.Generator().manual_seed(self._config.seed)
        size, seen = self._config.batch_size * self._processes.size, 0
        order = BatchOrder(self._task.keys, size, generator, self._task.training)
        while seen < TO_LEARN:
            batch = next(order)
            seen += len(batch)
            self._backward(batch, generator, self._processes.share(len(batch)))

    def _keep(self) -> None:
        """Make a pass over each picture of what is to be kept, as the mean of several says less of each weight."""
        self._is_learning = False
        generator = torch.Generator().manual_seed(self._config.seed)
        order = BatchOrder(self._task.keys, 1, generator, self._task.regularisation)
        rank, size = self._processes.rank, self._processes.size
        for number in range(-(-TO_KEEP // size) * size):
            mine = slice(None) if number % size == rank else slice(0, 0)
            self._backward(next(order), generator, mine)

    def _backward(self, batch: list[int], generator: torch.Generator, mine: slice) -> None:
        """Add up the gradient of a batch's mean loss, of a share of its pictures; the noise is that of all."""
        draw = self._passes.draw(batch, generator, True, mine)
        self._passes.backward(draw, self._scale * len(draw[0]) / len(batch))
        if len(draw[0]):
            self._passed()

    def _together(self, act: Callable[[], Any]) -> Any:
        """Do something that fails in all processes if it does in one; returns what it returns."""
        failed: BaseException | None = None
        made = None
        try:
            made = act()
        except NotFinite as error:  # in all of them, as they have the same sums
            self._processes.agree(FINE)
            raise error
        except BaseException as error:
            if not is_out_of_memory(error):
                self._processes.fail(error)
                raise
            failed = error
        try:
            if self._processes.agree(FINE if failed is None else NO_MEMORY) == NO_MEMORY:
                raise failed or MemoryError("memory has run out in another process")
        finally:
            failed = None  # which holds this frame
        return made
