"""SaRA: fine-tune a model by training only its smallest weights (arXiv:2409.06633)."""

from .selection import Selection, select

__all__ = ["Selection", "select"]
