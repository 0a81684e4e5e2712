"""A model whose small weights are being trained, whatever updates them: what it learns, and the way back."""

import math
from contextlib import AbstractContextManager

from torch import nn

from ..delta.sparse_delta import SparseDelta
from .sparse_model import SparseModel


class TrainedModel:
    """What `SaraAdamW` knows of its model, apart from the update.

    Attributes:
        threshold: Weights with a smaller magnitude were selected, unless each layer has one of its own; infinity
            where they were chosen otherwise.
        fingerprint: Of the base.
        num_steps: Updates made.
    """

    threshold: float
    fingerprint: str
    num_steps: int
    _weights: SparseModel

    @property
    def num_trainable(self) -> int:
        """Number of weights that train now."""
        return sum(weight.num_whole for weight in self._weights.active)

    def parameters(self) -> list[nn.Parameter]:
        """Return a flat leaf per trained parameter with its gradient; the values are in the model."""
        return [weight.leaf for weight in self._weights.active]

    def names(self) -> list[str]:
        """Return the names of the model's parameters in which weights have been trained."""
        weights = (*self._weights.active, *self._weights.frozen)
        return list(dict.fromkeys(weight.name for weight in weights))

    def delta(self, metadata: dict[str, str] | None = None) -> SparseDelta:
        """Return what was learned so far: trained minus base values, float32, by parameter name.

        Where an average of the trained values is kept, it takes their place.

        Args:
            metadata: Further text to keep in the delta's file.
        """
        return SparseDelta(self._weights.entries(), self.delta_metadata() | (metadata or {}))

    def delta_metadata(self) -> dict[str, str]:
        """Return what a delta's file says about the training so far."""
        has_one = math.isfinite(self.threshold)
        has_one &= all(weight.threshold is None for weight in self._weights.every)
        return {
            **({"sara.threshold": repr(self.threshold)} if has_one else {}),
            "sara.steps": str(self.num_steps),
            "sara.fingerprint": self.fingerprint,
        }

    def at_strength(self, strength: float) -> AbstractContextManager[None]:
        """Have the model act, within the context, as with the delta applied at this strength.

        Afterwards it holds the trained values again, bit for bit. Do not make steps meanwhile. Where
        an average of the trained values is kept, the model acts with that.

        Args:
            strength: Factor of what was learned; 0 is the base, 1 the whole.
        """
        return self._weights.at_strength(strength)

    def restore(self) -> None:
        """Put the base weights back, bit for bit, and let go of the model."""
        try:
            self._weights.restore_()
        finally:
            self._weights.detach()

    def detach(self) -> None:
        """Let go of the model with what it has learned: remove hooks, give `requires_grad` back."""
        self._weights.detach()
