"""One averaging of flat gradients over processes: in buckets, all of them at once or as they fill up."""

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .sparse_weight import SparseWeight

BUCKET = 1 << 23  # trained weights sent in one go


class Sent(NamedTuple):
    """A bucket of gradients on its way: which weights had one here, their sum to be, when it is there."""

    bucket: list[SparseWeight]
    had: list[bool]
    flat: Tensor
    work: "dist.Work"


class Round:
    """One averaging of the gradients of all weights, bucket by bucket in the order backward makes them.

    The buckets are sent in the same order by every process; the last one at the end of backward.

    Args:
        weights: In the same order everywhere.
        group: Processes that average.
        dtype: What is sent; None for the gradients as they are.
        overlap: Whether gradients may still come for buckets that are sent.
    """

    def __init__(
        self,
        weights: Sequence[SparseWeight],
        group: "dist.ProcessGroup | None",
        dtype: torch.dtype | None,
        overlap: bool,
    ):
        self._group, self._dtype, self._overlap = group, dtype, overlap
        self._size = dist.get_world_size(group)
        self._buckets = list(_buckets(weights[::-1]))
        self._missing = [{id(weight.parameter) for weight in bucket} for bucket in self._buckets]
        self._places = {
            id(tensor): (number, id(weight.parameter))
            for number, bucket in enumerate(self._buckets)
            for weight in bucket
            for tensor in (weight.parameter, weight.leaf)
        }
        self._sent: list[Sent] = []
        self._lock = threading.Lock()  # each device has its own thread in backward
        self._is_late = False

    @torch.no_grad()
    def arrived(self, tensor: Tensor) -> None:
        """Send the buckets that are full now that a parameter or leaf has got its gradient."""
        number, parameter = self._places[id(tensor)]
        with self._lock:
            self._missing[number].discard(parameter)
            self._is_late = self._is_late or number < len(self._sent)
            while len(self._sent) < len(self._buckets) - 1 and not self._missing[len(self._sent)]:
                self._send(self._buckets[len(self._sent)])

    def finish(self) -> bool:
        """Send what is left and wait for all; returns whether a gradient came late in any process."""
        while len(self._sent) < len(self._buckets):
            self._send(self._buckets[len(self._sent)])
        for sent in self._sent:
            sent.work.wait()
        return self._overlap and bool(self._sent) and bool(self._sent[-1].flat[-1])

    def take(self) -> None:
        """Give each weight the average of its gradients, added to what it has been given since.

        A weight without a gradient in any process has none afterwards.
        """
        for bucket, had, flat, _ in self._sent:
            leaf = bucket[0].leaf
            flat = flat.to(leaf.device, leaf.dtype)
            *parts, flags = flat.split([*map(len, bucket), len(flat) - sum(map(len, bucket))])
            for weight, is_here, part, count in zip(bucket, had, parts, flags, strict=False):
                if is_here or bool(count):
                    late, average = weight.gradient, part.div_(self._size)
                    weight.gradient = average if late is None else average.add_(late)

    def _send(self, bucket: list[SparseWeight]) -> None:
        """Start to sum the gradients of a bucket, and how many processes have one of each weight."""
        leaf = bucket[0].leaf
        had = [weight.gradient is not None for weight in bucket]
        parts = [leaf.new_zeros(len(w)) if w.gradient is None else w.gradient for w in bucket]
        flags = torch.tensor([*had, self._is_late] if self._overlap else had, dtype=leaf.dtype)
        flat = torch.cat([*parts, flags.to(leaf.device, non_blocking=True)])
        for weight in bucket:  # so that a gradient is held once
            weight.gradient = None
        # Sent from where the model computes, also if what is trained is kept in main memory.
        there = bucket[0].parameter.device
        flat = flat.to(there, self._dtype or flat.dtype)
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        if there != leaf.device and not self._overlap:  # or all of them would be there at once
            work.wait()
            flat = flat.to(leaf.device)
        self._sent.append(Sent(bucket, had, flat, work))


def _buckets(weights: Sequence[SparseWeight]) -> Iterator[list[SparseWeight]]:
    """Yield weights that are sent together: of one device and dtype, and not too many."""
    kinds: dict[tuple, list[SparseWeight]] = {}
    for weight in weights:
        kinds.setdefault((str(weight.leaf.device), weight.leaf.dtype), []).append(weight)
    for kind in kinds.values():
        bucket: list[SparseWeight] = []
        size = 0
        for weight in kind:
            if bucket and size + len(weight) > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(weight)
            size += len(weight)
        yield bucket
