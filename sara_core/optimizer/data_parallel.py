"""Averages what is trained over the processes of a data-parallel training: flat gradients, never dense ones.

Each process has the whole model and its own pictures. At the end of a backward pass the gradients of the
selected weights are summed over all processes, in buckets, and divided by their number: 4 bytes a trained
weight and step go over the wire, or 2 in bfloat16, where a wrapper such as DistributedDataParallel sends
every gradient of the model.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from .averaging import Round
from .sparse_weight import SparseWeight


class GradientAverage:
    """Averages gradients over a process group, at the end of backward or while it goes on.

    All processes make the same backward passes; what one of them left out is made up for by `finish`
    before the update. Nothing waits for the device, unless a weight got no gradient in this process, or
    gradients are sent while backward goes on: then a process asks at its end whether one of them got a
    gradient for a weight whose sum was under way, and all send what came late as well.

    Args:
        weights: Returns the weights that train now, in the same order everywhere.
        group: Processes that average; all of them by default.
        dtype: What is sent; by default the gradients as they are.
        every: Backward passes of an update, as with gradient accumulation; only the last one sends.
        overlap: Send a bucket of gradients as soon as it is full.
    """

    def __init__(
        self,
        weights: Callable[[], Sequence[SparseWeight]],
        group: "dist.ProcessGroup | None" = None,
        dtype: torch.dtype | None = None,
        every: int = 1,
        overlap: bool = False,
    ):
        self._weights, self._group, self._dtype, self._every = weights, group, dtype, every
        self._overlap = overlap
        if overlap:  # others may exchange something within backward, too, in an order of their own
            ranks = dist.get_process_group_ranks(group)
            self._group = dist.new_group(ranks, use_local_synchronization=True)  # type: ignore[assignment]
        self._is_held = False
        self.forget()

    def forget(self) -> None:
        """Begin anew, with no gradients."""
        self._passes, self._is_done, self._is_queued = 0, False, False
        self._round: Round | None = None

    def arrived(self, tensor: Tensor) -> None:
        """Take note that a gradient has come; called within backward.

        Args:
            tensor: Parameter or leaf of the weight whose gradient it is.
        """
        self._is_done = False
        if not self._is_queued:
            self._is_queued = True
            reference = weakref.ref(self)
            Variable._execution_engine.queue_callback(lambda: _end_backward(reference()))
            if self._overlap and self._is_last_pass():
                self._round = self._new_round()
        if self._round is not None:
            self._round.arrived(tensor)

    def end_backward(self) -> None:
        """Average if this was the last pass before an update.

        A pass within a pass, as reentrant checkpoints make them, is none of its own; if all gradients come
        within such, they are averaged when the update is made.
        """
        self._is_queued = False
        if torch._C._current_autograd_node() is not None:
            return
        is_last = self._is_last_pass()
        self._passes += 1
        if is_last:
            self.finish()

    def _is_last_pass(self) -> bool:
        return not self._is_held and (self._passes + 1) % self._every == 0

    def _new_round(self) -> "Round":
        return Round(self._weights(), self._group, self._dtype, self._overlap)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Send nothing at the end of the backward passes within the context."""
        was, self._is_held = self._is_held, True
        try:
            yield
        finally:
            self._is_held = was

    @torch.no_grad()
    def finish(self) -> None:
        """Average the gradients, unless that has been done since the last one came.

        Those that have been averaged before stay as they are, to rounding. A weight without a gradient
        in any process has none afterwards; one with a gradient in some counts as 0 in the others.
        """
        if self._is_done:
            return
        round_, self._round = self._round or self._new_round(), None
        if round_.finish():
            of_late = self._new_round()
            of_late.finish()
            of_late.take()
        round_.take()
        self._is_done = True


def is_shared(group: "dist.ProcessGroup | None" = None) -> bool:
    """Tell whether torch.distributed is initialised for more processes than this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if a model is wrapped for a full fine-tuning already.

    Raises:
        TypeError: It is.
    """
    if type(model).__name__ == "FullyShardedDataParallel":
        raise TypeError(
            "the model is wrapped in FullyShardedDataParallel, which keeps its weights in one flat "
            "parameter; divide it by torch.distributed.fsdp.fully_shard instead, then make SaraAdamW"
        )
    if type(model).__name__ == "DistributedDataParallel":
        raise TypeError(
            "the model is wrapped in DistributedDataParallel, which has made buffers for every gradient; "
            "give SaraAdamW the model itself. It averages what it trains by itself, so that no wrapper is "
            "needed; one that is made after SaraAdamW does no harm"
        )


def refuse_differences(facts: Mapping[str, object], group: "dist.ProcessGroup | None") -> None:
    """Raise, in every process, if facts about what is trained are not the same in all of them.

    Args:
        facts: Plain values by name.
        group: The processes.

    Raises:
        ValueError: Naming the processes that differ from the first, and in what.
    """
    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, dict(facts), group=group)
    lines = [
        f"rank {rank} has {name} {own[name]!r:.40}, rank 0 {found[0][name]!r:.40}"
        for rank, own in enumerate(found)
        for name in facts
        if own[name] != found[0][name]
    ]
    if lines:
        raise ValueError(
            f"the processes of this training do not train the same: {'; '.join(lines[:5])}. Load the "
            "same checkpoint with the same settings in all of them, before SaraAdamW is made"
        )


def _end_backward(average: GradientAverage | None) -> None:
    if average is not None:
        average.end_backward()
