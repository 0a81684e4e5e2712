"""Curves of a run as TensorBoard reads them, written by torch's own writer."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

logger = logging.getLogger("comfyui-sara")

SECONDS_BETWEEN = 10  # until what is written can be seen


def refuse_missing() -> None:
    """Raise ImportError if the package tensorboard is missing."""
    _writer_class()


def _writer_class() -> Callable[..., Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception as error:  # beside packages it does not fit, it may fail in any way
        raise ImportError(
            f"event files need the package tensorboard, which cannot be imported ({error}). Install it (pip "
            "install tensorboard) in the Python that runs this, or turn tensorboard off"
        ) from error
    return SummaryWriter


class EventFiles:
    """Writes numbers by step; whatever goes wrong with that is said once, and the run goes on.

    Args:
        folder: Made with the first number. Of what it holds of earlier writers, the first step that is
            written hides what is of that step or later ones.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None
        self._has_failed = False

    def add(self, step: int, **numbers: float | None) -> None:
        """Write numbers by name; those that are None are left out."""
        if self._has_failed:
            return
        try:
            if self._writer is None:
                self._writer = _writer_class()(
                    str(self._folder), purge_step=step, flush_secs=SECONDS_BETWEEN
                )
            for name, number in numbers.items():
                if number is not None:
                    self._writer.add_scalar(name, number, step)
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """Write what is left and let go of the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._has_failed = True
        logger.warning(
            "no more event files for TensorBoard in %s (%s); the run goes on", self._folder, error
        )
