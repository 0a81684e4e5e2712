"""An exponential average of the trained values, which is put out in their place."""

from collections.abc import Iterable

import torch

from .sparse_weight import SparseWeight


def refuse_bad_decay(decay: float) -> None:
    """Raise if a decay is not in `[0, 1)`.

    Raises:
        ValueError: It is not.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay is {decay!r}; expected 0 (off) or a number below 1")


def decay_at(limit: float, num_steps: int) -> float:
    """Return the decay after so many updates, from 1 on: lower at first, so that the start is forgotten.

    `min(limit, (1 + n) / (10 + n))`, as torch's and TensorFlow's averages are usually begun.
    """
    return min(limit, (1 + num_steps) / (10 + num_steps))


@torch.no_grad()
def follow_(weights: Iterable[SparseWeight], limit: float, num_steps: int) -> None:
    """Take the trained values after an update into their averages.

    Args:
        weights: Those that train and those that no longer do; an average begins with the first values.
        limit: The decay in the long run, in `(0, 1)`.
        num_steps: Updates made, this one included.
    """
    share = 1 - decay_at(limit, num_steps)
    for weight in weights:
        trained = weight.trained
        if weight.average is None:
            weight.average = trained.clone()
        else:
            weight.average.lerp_(trained, share)
