"""What the widget of SaRA Train shows while it trains."""

import logging
import math
import time
from collections.abc import Callable, Sequence

from ...sara_core.training.task import StepReport
from .. import host, page_state
from .curve import Curve

logger = logging.getLogger("comfyui-sara")

EVENT, KIND = "sara.training", "sara_training"
SECONDS_BETWEEN = 1.0
PACE = 0.1  # weight of the newest step in the mean time per step


class LiveChart:
    """Follows a run and tells the browser, whole each time, so that one who reloads misses nothing.

    Args:
        node_id: The node that trains; without one nothing is sent.
        run: Name of the run.
        num_steps: Steps it has in all.
        workflow: Id of the workflow the node is in.
        subfolder: Of previews, below the output folder.

    Attributes:
        can_preview: Whether there is something to make previews of.
        epochs: How often all steps together go over the pictures, once it is known.
        memory_need: Bytes that the run needs, by what for, once they are known.
        by_noise: Returns the mean losses by noise level, at first and recent ones.
    """

    def __init__(
        self,
        node_id: str | None,
        run: str,
        num_steps: int,
        workflow: str | None = None,
        subfolder: str = "",
    ):
        self.node_id, self.run, self.num_steps = node_id, run, num_steps
        self.workflow, self._subfolder = workflow, subfolder
        self._losses = Curve()
        self._validation: list[list[float]] = []
        self._previews: list[list] = []  # step, file name
        self._marks: list[list] = []  # step, kind, text
        self._warnings: list[str] = []
        self._rates = Curve()
        self._step, self._stage, self._status = 0, 1, "training"
        self._pace: float | None = None
        self._last_step = self._last_sent = time.monotonic()
        self._started = time.time()
        self.can_preview = False
        self.epochs: float | None = None
        self.memory_need: dict[str, int] | None = None
        self.by_noise: Callable[[], list] = list

    def start(
        self,
        losses: list[float],
        rates: list[float],
        validation: list[tuple[int, float]],
        stage: int,
        previews: Sequence[tuple[int, str]] = (),
    ) -> None:
        """Show what a resumed run has behind it."""
        self._losses, self._rates = Curve(losses), Curve(rates)
        self._step, self._stage = len(losses), stage
        self._validation = []
        self._previews = [list(preview) for preview in previews]
        for step, loss in validation:
            self.add_validation(step, loss)
        self._last_step = time.monotonic()
        self.send()

    def add(self, report: StepReport) -> None:
        """Show a step."""
        now = time.monotonic()
        seconds, self._last_step = now - self._last_step, now
        self._pace = seconds if self._pace is None else self._pace + PACE * (seconds - self._pace)
        self._step = report.step
        self._losses.add(report.loss)
        self._rates.add(report.learning_rate)
        if report.stage != self._stage:
            self.mark("stage", f"stage {report.stage}")
        self._stage = report.stage
        if report.skipped:
            self.mark("error", "not finite, left out")
        if now - self._last_sent >= SECONDS_BETWEEN:
            self.send()

    def add_validation(self, step: int, loss: float) -> None:
        """Show a loss on the pictures held out; one that is not finite is not shown."""
        if math.isfinite(loss):
            self._validation.append([step, loss])

    def add_preview(self, step: int, name: str) -> None:
        """Show a picture in the folder of previews. The time it took is not that of a step."""
        self._previews.append([step, name])
        self._last_step = time.monotonic()
        self.send()

    def mark(self, kind: str, text: str) -> None:
        """Mark the present step: `stage`, `saved`, `cancelled` or `error`."""
        self._marks.append([self._step, kind, text])

    def warn(self, text: str) -> None:
        """Show a line that stays."""
        self._warnings.append(text)

    def stop(self, text: str, is_cancelled: bool = False) -> None:
        """Show that it ended before its last step, and why."""
        self._status = "cancelled" if is_cancelled else "stopped"
        self.mark("cancelled" if is_cancelled else "error", text)
        self.send()

    def finish(self) -> dict:
        """Show that all steps are made, and return the last state."""
        self._status = "finished"
        self.send()
        return self.state()

    def send(self) -> None:
        """Tell the browser the present state; whatever goes wrong with that, the training goes on."""
        self._last_sent = time.monotonic()
        if self.node_id is None:
            return
        try:
            state = self.state()
            page_state.keep(KIND, state)
            host.send_event(EVENT, state)
        except Exception as error:
            logger.warning("SaRA Train: the chart is not shown: %s", error)
            self.node_id = None

    def state(self) -> dict:
        """Return all that is shown, as JSON takes it."""
        used, total = host.memory_in_use()
        left = None if self._pace is None else self._pace * (self.num_steps - self._step)
        return {
            "node": self.node_id,
            "workflow": self.workflow,
            "run": self.run,
            "started": self._started,
            "status": self._status,
            "step": self._step,
            "steps": self.num_steps,
            "stage": self._stage,
            "losses": self._losses.points(),
            "validation": self._validation,
            "rates": self._rates.points(),
            "marks": self._marks[-200:],
            "warnings": self._warnings,
            "previews": self._previews[-200:],
            "preview_folder": self._subfolder,
            "seconds_per_step": self._pace,
            "seconds_left": left,
            "memory_used": used,
            "memory_total": total,
            "epochs": self.epochs,
            "can_preview": self.can_preview,
            "memory_need": self.memory_need,
            "by_noise": self.by_noise(),
        }
