"""Pictures made by the model while it trains."""

import logging
from pathlib import Path

from ...sara_core import SaraAdamW
from ...sara_core.files.atomic import replace_atomically
from ...sara_core.training.run_folder import RunFolder
from .. import host
from ..sampling.picture_sheets import row_of, stack, thumbnail

logger = logging.getLogger("comfyui-sara")


class Previews:
    """Makes a picture every so many steps and keeps it in the run's folder.

    Args:
        calls: The model in training.
        optimizer: Holds what it has learned.
        samplings: What to sample; a row each. None are made without.
        folder: Of the run.

    Attributes:
        thumbnail: The newest first sample as a data URL; empty before there is one.
    """

    def __init__(
        self,
        calls: host.ModelCalls,
        optimizer: SaraAdamW,
        samplings: list[host.Sampling],
        folder: RunFolder,
    ):
        self.calls, self.optimizer, self.samplings, self.folder = (
            calls,
            optimizer,
            samplings,
            folder,
        )
        self.thumbnail = ""

    def is_due(self, step: int) -> bool:
        """Tell whether a picture is to be made after a step; with 0 before the first one."""
        every = self.folder.settings.preview_every_steps
        is_last = step == self.folder.settings.last_step
        return (is_last or (every > 0 and step % every == 0)) and self.can_make(step)

    def can_make(self, step: int) -> bool:
        """Tell whether there is something to sample, and no picture after this step yet."""
        return bool(self.samplings) and not self.folder.preview_path(step).exists()

    def make(self, step: int) -> tuple[Path | None, str]:
        """Sample and save. What goes wrong does not end the training.

        Returns:
            The picture's path, or None and what went wrong; no more are made then.
        """
        # Outside what is survived: if the trained values cannot be put back, the run must end.
        with self.optimizer.at_strength(self.folder.settings.preview_strength):
            return self._make(step)

    def _make(self, step: int) -> tuple[Path | None, str]:
        try:
            pictures = [host.sample_in_training(self.calls, s) for s in self.samplings]
            sheet = stack([row_of(row) for row in pictures])
            path = self.folder.preview_path(step)
            path.parent.mkdir(exist_ok=True)
            replace_atomically(path, lambda file: sheet.save(file, "PNG"))
        except host.Cancelled:
            raise
        except Exception as error:
            logger.warning("SaRA Train: no more previews", exc_info=error)
            self.samplings = []
            is_explained = isinstance(error, ValueError)
            problem = str(error) if is_explained else f"{type(error).__name__}: {error}"
        else:
            self.thumbnail = thumbnail(pictures[0][0])
            return path, ""
        host.free_memory()  # outside the except block, where the error held on to tensors
        return None, problem
