"""The processes that train together: which share of a batch is whose, and that all go on or none does."""

import torch
import torch.distributed as dist
from torch import Tensor

FINE, NO_MEMORY, ERROR = 0, 1, 2  # how a process came through a step


class OtherProcessFailed(RuntimeError):
    """Another process of this training has ended with an error."""


class Processes:
    """The processes of `torch.distributed`'s default group, or this one alone.

    Every process calls `agree` once a step, or `fail` once instead, so that none waits for one that has
    ended.

    Args:
        device: Where they exchange numbers: the one gradients are on.
        distributed: Whether there are others.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
    """

    def __init__(self, device: torch.device, distributed: bool):
        self.rank, self.size, self._device = 0, 1, device
        if distributed:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def share(self, count: int) -> slice:
        """Return which of `count` pictures are this process's: as many as the others', or one less."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum of every process's numbers."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def agree(self, how: int, error: BaseException | None = None) -> int:
        """Tell the others how this process came through the step; returns how the worst did.

        Raises:
            OtherProcessFailed: Another one has failed, and this one has not.
        """
        if self.size == 1:
            return how
        worst = torch.tensor([how], device=self._device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if int(worst) != ERROR:
            return int(worst)
        found: list = [None] * self.size
        dist.all_gather_object(found, None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            lines = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None]
            raise OtherProcessFailed(
                f"the training has ended in another process. {'; '.join(lines)}"
            )
        return ERROR

    def fail(self, error: BaseException) -> None:
        """Tell the others, instead of `agree`, that this process ends with an error."""
        if not isinstance(error, OtherProcessFailed):
            self.agree(ERROR, error)
