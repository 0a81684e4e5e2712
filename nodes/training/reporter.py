"""Tells of a run: in the console, in the run's log and on the node."""

import logging
from collections.abc import Sequence

from ...sara_core.training.run_folder import RunFolder
from ...sara_core.training.task import StepReport
from .. import host, output_folder
from .live_chart import LiveChart

logger = logging.getLogger("comfyui-sara")

NUM_LINES = 50  # about, in the console, of a run's steps


class Reporter:
    """Says what happens, and shows each step.

    Args:
        folder: Of the run.
        node_id: Node that shows the progress.
        workflow: Id of the workflow the node is in.
    """

    def __init__(self, folder: RunFolder, node_id: str | None, workflow: str | None):
        self.folder, self.node_id = folder, node_id
        steps = folder.settings.steps
        self.progress = host.Progress(steps, node_id)
        previews = output_folder.view_subfolder(folder.preview_path(0).parent)
        self.chart = LiveChart(node_id, folder.path.name, steps, workflow, previews)
        self._had_zero = False
        self._every = max(1, steps // NUM_LINES)

    def say(self, text: str) -> str:
        """Tell one line, and return it as an error's message would have it."""
        logger.info("SaRA Train: %s", text)
        self.folder.log(text)
        return f"SaRA Train: {text}"

    def warn(self, text: str) -> str:
        """Tell one line that stays to be seen on the node."""
        self.chart.warn(text)
        return self.say(text)

    def step(self, report: StepReport, losses: Sequence[float]) -> None:
        """Show a step that was made; `losses` are those of all steps up to it."""
        self.folder.add_loss(report)
        self.chart.add(report)
        if report.skipped:
            self.say(f"step {report.step} was not finite and changed nothing")
        elif report.loss == 0 and not self._had_zero:
            self._had_zero = True
            self.warn(
                f"step {report.step}: the loss is exactly 0, so nothing was learned in it; masks may "
                "keep nothing of its pictures, or the model does not use what it is given"
            )
        elif report.step % self._every == 0:
            mean = sum(losses[-self._every :]) / len(losses[-self._every :])
            logger.info(
                "SaRA Train: step %d of %d, stage %d, loss %.4f, learning rate %.2e",
                report.step, self.folder.settings.steps, report.stage, mean, report.learning_rate,
            )  # fmt: skip

    def validation(self, step: int, loss: float) -> None:
        """Show a loss on the pictures held out."""
        self.folder.add_validation(step, loss)
        self.chart.add_validation(step, loss)
        self.say(f"step {step}: validation loss {loss:.4f}")
