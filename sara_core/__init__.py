"""SaRA: fine-tune a model by training only its smallest weights (arXiv:2409.06633)."""

from .delta.delta_file import DeltaEntry
from .delta.sparse_delta import SparseDelta
from .optimizer.gradient_selection import select_by_gradient
from .optimizer.sara_adamw import SaraAdamW
from .weights.selection import Selection, select

__all__ = ["DeltaEntry", "SaraAdamW", "Selection", "SparseDelta", "select", "select_by_gradient"]
