"""SaRA: fine-tune a model by training only its smallest weights (arXiv:2409.06633)."""

from .delta import SparseDelta
from .delta_file import DeltaEntry
from .optimizer import SaraAdamW
from .weights.selection import Selection, select

__all__ = ["DeltaEntry", "SaraAdamW", "Selection", "SparseDelta", "select"]
