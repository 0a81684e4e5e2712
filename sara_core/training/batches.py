"""Order of the training pictures: shuffled epochs of batches of one size each."""

from collections.abc import Hashable, Sequence

import torch


class BatchOrder:
    """An endless iterator over batches of picture numbers; in each epoch every picture comes once.

    A batch never mixes keys, so its pictures can be stacked; the last one of a key may be smaller
    than `batch_size`.

    Args:
        keys: Bucket of each picture, such as its latent's shape.
        batch_size: Largest number of pictures in a batch.
        generator: Source of the order, on the CPU. It is asked at the start of an epoch only.
        pictures: Numbers of those to go over; all by default.

    Raises:
        ValueError: No pictures, or a batch size below 1.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        batch_size: int,
        generator: torch.Generator,
        pictures: Sequence[int] | None = None,
    ):
        pictures = range(len(keys)) if pictures is None else pictures
        if not pictures or batch_size < 1:
            raise ValueError(
                f"{len(pictures)} pictures in batches of {batch_size}; expected at least 1 of 1"
            )
        self._buckets = by_key(keys, pictures)
        self._batch_size = batch_size
        self._generator = generator
        self.remaining: list[list[int]] = []  # of this epoch; with the generator, the whole state

    def __iter__(self) -> "BatchOrder":
        return self

    def __next__(self) -> list[int]:
        if not self.remaining:
            self.remaining = self._epoch()
        first, *self.remaining = self.remaining
        return first

    def _epoch(self) -> list[list[int]]:
        epoch = []
        for pictures in self._buckets.values():
            order = torch.randperm(len(pictures), generator=self._generator).tolist()
            shuffled = [pictures[i] for i in order]
            epoch += [
                shuffled[i : i + self._batch_size]
                for i in range(0, len(shuffled), self._batch_size)
            ]
        return [epoch[i] for i in torch.randperm(len(epoch), generator=self._generator).tolist()]


def batches_in_epoch(keys: Sequence[Hashable], batch_size: int, pictures: Sequence[int]) -> int:
    """Return how many batches of one key each an epoch has; see `BatchOrder`."""
    return sum(-(-len(bucket) // batch_size) for bucket in by_key(keys, pictures).values())


def by_key(keys: Sequence[Hashable], pictures: Sequence[int]) -> dict[Hashable, list[int]]:
    """Group picture numbers by key, in the order of their first appearance."""
    buckets: dict[Hashable, list[int]] = {}
    for picture in pictures:
        buckets.setdefault(keys[picture], []).append(picture)
    return buckets
