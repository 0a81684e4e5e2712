"""The steps of a run between two stops, with what is due between them."""

import dataclasses
import traceback

from ...sara_core.training.out_of_memory import is_out_of_memory
from ...sara_core.training.run_settings import BY_GRADIENT
from ...sara_core.training.trainer import TrainingRun
from .. import host
from .ending import refuse_unlearned
from .folders import best_of
from .previews import Previews
from .reporter import Reporter
from .saver import Saver
from .wishes import END, PREVIEW, SAVE, Wishes


class Session:
    """Makes steps; measures, previews and saves when it is time, and ends when it is enough.

    Args:
        training: The loop.
        previews: Pictures the model makes on the way.
        reporter: Shows what happens.
        saver: Keeps what is learned, and the losses.
        wishes: What people ask for meanwhile.
    """

    def __init__(
        self,
        training: TrainingRun,
        previews: Previews,
        reporter: Reporter,
        saver: Saver,
        wishes: Wishes,
    ):
        self.training, self.previews = training, previews
        self.reporter, self.saver, self.wishes = reporter, saver, wishes
        self.settings = saver.folder.settings

    def train(self, rates: list[float]) -> None:
        """Make the steps that are left. On any end but the last step, save and say so.

        Args:
            rates: Learning rates of the steps that a resumed run has behind it.
        """
        self._begin(rates)
        try:
            self._between_steps()
            for report in self.training:
                self.saver.losses.append(report.loss)
                self.reporter.step(report, self.saver.losses)
                self._between_steps()
                every = self.settings.save_every_steps
                if report.stage != self._stage or (every and report.step % every == 0):
                    self._stage = report.stage
                    self.saver.save()
                self.reporter.progress.update(report.step)
                if reason := self._enough(self._fulfil(self.wishes.take())):
                    self._end(reason)
            refuse_unlearned(self.training.optimizer.num_steps)
        except BaseException as error:
            if is_out_of_memory(error):  # its traceback holds on to the step's activations
                traceback.clear_frames(error.__traceback__)
                host.free_memory()
            text = self.saver.save_at_the_end(error)
            self.reporter.chart.stop(text, isinstance(error, host.Cancelled))
            raise

    def _begin(self, rates: list[float]) -> None:
        optimizer, folder = self.training.optimizer, self.saver.folder
        self._stage = optimizer.stage
        which = f"those below {optimizer.threshold:.4g}"
        if self.settings.select_by == BY_GRADIENT:
            which = f"the {100 * self.settings.fraction:.3g} % that learn most"
        elif self.settings.selection_rule.get("by_parameter"):
            which = f"the smallest {100 * self.settings.fraction:.3g} % of each layer"
        own = ", of single weights from an eighth of to eight times that"
        self.reporter.say(
            f"training {optimizer.num_trainable} of {optimizer.num_considered} weights, {which}, for {self.settings.steps} steps at a learning rate "
            f"of at most {self.training.peak_rate:.3g}{own if optimizer.has_weight_rates else ''}, in {folder.path}"
        )
        chart = self.reporter.chart
        chart.by_noise = self.training.noise_tally.means
        previews = folder.previews(self.training.step)
        chart.start(self.saver.losses, rates, self.saver.validation, self._stage, previews)

    def _between_steps(self) -> None:
        self._validate()
        self._preview()

    def _validate(self) -> None:
        """Measure the loss on the pictures held out, if it is time and was not done before a stop."""
        step, done = self.training.step, self.saver.validation
        is_due = step % self.settings.validate_every_steps == 0 or step == self.settings.last_step
        is_done = bool(done) and done[-1][0] == step
        loss = self.training.validate() if is_due and not is_done else None
        if loss is not None:
            done.append((step, loss))
            self.reporter.validation(step, loss)
            self.saver.keep_best()

    def _preview(self) -> None:
        """Have the model make pictures, if it is time."""
        if self.previews.is_due(self.training.step):
            self._make_preview()

    def _make_preview(self) -> None:
        step = self.training.step
        path, problem = self.previews.make(step)
        if path is None:
            self.reporter.warn(f"step {step}: no more previews ({problem}); the training goes on")
        else:
            self.reporter.chart.add_preview(step, path.name)

    def _fulfil(self, wishes: list[str]) -> bool:
        """Save and preview if it is asked; returns whether the run is to end."""
        if SAVE in wishes:
            self.saver.save()
        if PREVIEW in wishes and self.previews.can_make(self.training.step):
            self._make_preview()
        return END in wishes

    def _enough(self, is_asked: bool) -> str | None:
        """Say why no more steps are to be made; None if they are."""
        step, settings = self.training.step, self.settings
        if step == settings.last_step:
            return None
        if is_asked:
            return "as asked"
        best = best_of(self.saver.validation, after=settings.schedule_start)
        since = best and [entry for entry in self.saver.validation if entry[0] > best[0]]
        if not settings.patience or not since or len(since) < settings.patience:
            return None
        return (
            f"the loss on the pictures held out was lowest after step {best[0]} ({best[1]:.4f}), and not "
            f"lower in {len(since)} measurements since"
        )

    def _end(self, reason: str) -> None:
        """Make this step the last one, with what is due after it."""
        step, folder = self.training.step, self.saver.folder
        self.training.end()
        folder.settings = self.settings = dataclasses.replace(self.settings, ended_at=step)
        folder.save_settings()
        self._between_steps()
        self.reporter.warn(f"ended after step {step} of {self.settings.steps}: {reason}")
