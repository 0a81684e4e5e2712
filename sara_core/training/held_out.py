"""The loss on pictures that are held out, always at the same noise."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from .batches import by_key
from .out_of_memory import is_out_of_memory
from .passes import Passes
from .task import TrainingTask

logger = logging.getLogger("comfyui-sara")

SEED, DRAWS = 2409, 4


class HeldOut:
    """Measures the loss on the pictures held out; in smaller parts where memory runs out.

    Args:
        task: Model and pictures.
        passes: Ask the model.
        free_memory: Called before a measurement is tried again after memory has run out.
    """

    def __init__(self, task: TrainingTask, passes: Passes, free_memory: Callable[[], None]):
        self._task, self._passes, self._free_memory = task, passes, free_memory
        self._num_parts = 1

    @torch.no_grad()
    def loss(self, batch_size: int, acting: Callable[[], AbstractContextManager]) -> float | None:
        """Return the mean loss; None without pictures.

        Args:
            batch_size: Pictures that go together, if their keys do.
            acting: Makes a context in which the model acts with what is measured.
        """
        while True:
            num_parts = max(self._passes.num_parts, self._num_parts)
            try:
                with acting():
                    return self._loss(batch_size, num_parts)
            except Exception as error:
                if not is_out_of_memory(error) or num_parts >= batch_size:
                    raise
            self._num_parts = min(2 * num_parts, batch_size)
            self._free_memory()  # outside the except block, where the error held on to tensors
            logger.warning(
                "memory ran out while pictures held out were measured; going on in %d parts, with the same "
                "result",
                self._num_parts,
            )

    def _loss(self, batch_size: int, num_parts: int) -> float | None:
        pictures = self._task.validation
        batches = [
            bucket[start : start + batch_size]
            for bucket in by_key(self._task.keys, pictures).values()
            for start in range(0, len(bucket), batch_size)
        ]
        generator = torch.Generator().manual_seed(SEED)
        losses = [
            self._passes.total_loss(self._passes.draw(batch, generator), num_parts)
            for batch in batches * DRAWS
        ]
        return torch.stack(losses).sum().item() / (len(pictures) * DRAWS) if losses else None
