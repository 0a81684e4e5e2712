"""The processes that train together: which share of a batch is whose, and that all go on or none does."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

FINE, NO_MEMORY, ENOUGH, ERROR = range(4)  # how a process came through a step

Made = TypeVar("Made")


class OtherProcessFailed(RuntimeError):
    """Another process of this training has ended with an error.

    Args:
        errors: By rank, as `ValueError: its message`; None for those without.

    Attributes:
        kinds: Names of the errors' types.
    """

    def __init__(self, errors: list[str | None]):
        lines = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
        super().__init__(f"the training has ended in another process. {'; '.join(lines)}")
        self.kinds = {text.partition(":")[0] for text in errors if text is not None}


class Processes:
    """The processes of `torch.distributed`'s default group, or this one alone.

    In training every process calls `agree` once a step, or `fail` once instead, so that none waits for
    one that has ended. Before and after it, they exchange what they have by `gather` and `lead`.

    Args:
        device: Where they exchange numbers: the one gradients are on.
        distributed: Whether there are others.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
    """

    def __init__(self, device: torch.device, distributed: bool):
        self.rank, self.size, self._device = 0, 1, device
        self._has_ended = False
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
        if int(worst) == ERROR:
            self._has_ended = True
            self._exchange(None, error)
        return int(worst)

    def fail(self, error: BaseException) -> None:
        """Tell the others, instead of `agree`, that this process ends with an error.

        It may be called again, and where another process has failed; only the first error is told.
        """
        if not self._has_ended:
            self._has_ended = True
            self.agree(ERROR, error)

    def gather(self, make: Callable[[], Made]) -> list[Made]:
        """Have every process make something; returns what each of them made, by rank.

        Raises:
            OtherProcessFailed: Another one has failed to, and this one has not.
            Exception: What `make` raises.
        """
        if self.size == 1:
            return [make()]
        try:
            made = make()
        except BaseException as error:
            self._exchange(None, error)
            raise
        return self._exchange(made)

    def lead(self, make: Callable[[], Made]) -> Made:
        """Have the first process make something, and return it in all of them.

        Raises:
            OtherProcessFailed: It has failed to, in all but the first.
            Exception: What `make` raises, in the first.
        """
        made: list = [None]

        def first() -> None:
            made[0] = make() if self.rank == 0 else None

        self.gather(first)
        if self.size > 1:
            dist.broadcast_object_list(made)
        return made[0]

    def _exchange(self, made: object, error: BaseException | None = None) -> list:
        """Return what all have made, unless another process than this one has failed."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        found: list = [None] * self.size
        dist.all_gather_object(found, (made, text))
        errors = [text for _, text in found]
        if error is None and any(errors):
            raise OtherProcessFailed(errors)
        return [made for made, _ in found]
