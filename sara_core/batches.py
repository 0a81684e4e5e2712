"""Order of the training pictures: shuffled epochs of batches of one size each."""

from collections.abc import Hashable, Iterator, Sequence

import torch


def batches(
    keys: Sequence[Hashable], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Yield batches of picture numbers without end; in each epoch every picture comes once.

    A batch never mixes keys, so its pictures can be stacked; the last one of a key may be smaller
    than `batch_size`.

    Args:
        keys: Bucket of each picture, such as its latent's shape.
        batch_size: Largest number of pictures in a batch.
        generator: Source of the order, on the CPU.

    Raises:
        ValueError: No pictures, or a batch size below 1.
    """
    if not keys or batch_size < 1:
        raise ValueError(
            f"{len(keys)} pictures in batches of {batch_size}; expected at least 1 of 1"
        )
    buckets: dict[Hashable, list[int]] = {}
    for picture, key in enumerate(keys):
        buckets.setdefault(key, []).append(picture)
    while True:
        epoch = []
        for pictures in buckets.values():
            order = torch.randperm(len(pictures), generator=generator).tolist()
            shuffled = [pictures[i] for i in order]
            epoch += [shuffled[i : i + batch_size] for i in range(0, len(shuffled), batch_size)]
        for i in torch.randperm(len(epoch), generator=generator).tolist():
            yield epoch[i]
