"""The steps of a run between two stops, with what is due between them."""

import traceback

from ...sara_core.training.out_of_memory import is_out_of_memory
from ...sara_core.training.trainer import TrainingRun
from .. import host
from .ending import refuse_unlearned
from .previews import Previews
from .reporter import Reporter
from .saver import Saver


class Session:
    """Makes steps; measures, previews and saves when it is time.

    Args:
        training: The loop.
        previews: Pictures the model makes on the way.
        reporter: Shows what happens.
        saver: Keeps what is learned, and the losses.
    """

    def __init__(self, training: TrainingRun, previews: Previews, reporter: Reporter, saver: Saver):
        self.training, self.previews = training, previews
        self.reporter, self.saver = reporter, saver
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
        self.reporter.say(
            f"training {optimizer.num_trainable} of {optimizer.num_considered} weights, those "
            f"below {optimizer.threshold:.4g}, for {self.settings.steps} steps at a learning rate "
            f"of {self.training.learning_rate(self.settings.schedule_start):.3g}, in {folder.path}"
        )
        chart = self.reporter.chart
        chart.start(self.saver.losses, rates, self.saver.validation, self._stage)
        for step, name in folder.previews(self.training.step):
            chart.add_preview(step, name)

    def _between_steps(self) -> None:
        self._validate()
        self._preview()

    def _validate(self) -> None:
        """Measure the loss on the pictures held out, if it is time and was not done before a stop."""
        step, done = self.training.step, self.saver.validation
        is_due = step % self.settings.validate_every_steps == 0 or step == self.settings.steps
        is_done = bool(done) and done[-1][0] == step
        loss = self.training.validate() if is_due and not is_done else None
        if loss is not None:
            done.append((step, loss))
            self.reporter.validation(step, loss)

    def _preview(self) -> None:
        """Have the model make pictures, if it is time."""
        step = self.training.step
        if not self.previews.is_due(step):
            return
        path, problem = self.previews.make(step)
        if path is None:
            self.reporter.warn(f"step {step}: no more previews ({problem}); the training goes on")
        else:
            self.reporter.chart.add_preview(step, path.name)
