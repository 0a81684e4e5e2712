"""One training run: pictures and settings in, delta and losses out, everything saved on the way."""

import contextlib
import json
import logging
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from ...sara_core import SaraAdamW
from ...sara_core.training.config import TrainConfig
from ...sara_core.training.gradient_checkpointing import checkpointed
from ...sara_core.training.out_of_memory import is_out_of_memory
from ...sara_core.training.run_folder import RunFolder
from ...sara_core.training.task import StepReport
from ...sara_core.training.trainer import TrainingRun
from ...sara_core.weights.fingerprint import take_fingerprint
from .. import host, output_folder
from ..inputs import SAVE_DTYPES, selection_rule
from .examples import Examples, describe_examples, differences
from .live_chart import LiveChart
from .previews import Previews
from .training_set import TrainingSet
from .widgets import COMPUTE_DTYPES, NEW_RUN

logger = logging.getLogger("comfyui-sara")

NUM_TEXT_UPDATES = 50
MEMORY_ADVICE = (
    "To need less memory: turn gradient_checkpointing on, lower batch_size, use smaller pictures, "
    "train a smaller fraction, set moments to 8bit, turn offloading on."
)


def run(
    patcher,
    examples: Examples,
    folder: RunFolder,
    node_id: str | None,
    resume: bool = False,
    workflow: str | None = None,
    samplings: Sequence[host.Sampling] = (),
) -> tuple[Path, dict[str, list], dict]:
    """Train a MODEL in place, save what it learns, and put its base weights back.

    Whatever ends it, the delta and the state after the last whole step are in the folder.

    Args:
        patcher: The MODEL.
        examples: Latents, captions and the empty caption.
        folder: Where the run is kept; its settings are the node's widgets.
        node_id: Node that shows the progress.
        resume: Go on from the folder's state.
        workflow: Id of the workflow the node is in.
        samplings: What to make previews of.

    Returns:
        File of the final delta; the losses: `loss` of each step, and `validation_loss` after each of
        `validation_step`; and what the node's chart shows.
    """
    settings = folder.settings
    dtype = COMPUTE_DTYPES[settings["training_dtype"]]
    zeros = host.zero_rule(patcher, settings["zeros"])
    offloading = settings.get("offloading", False)
    with contextlib.closing(folder), host.trainable(patcher, dtype, offloading) as calls:
        config = _config(settings, has_empty=examples.empty is not None)
        pictures = TrainingSet(calls, examples, settings["validation_split"], settings["seed"])
        model = calls.model.diffusion_model
        scaler = None
        if host.needs_loss_scaling(patcher, dtype):
            scaler = torch.amp.GradScaler(calls.device.type)
        optimizer = _optimizer(model, settings | {"zeros": zeros})
        try:
            training = TrainingRun(optimizer, pictures, config, scaler, host.free_memory)
            previews = Previews(calls, optimizer, list(samplings), folder)
            session = Session(patcher, examples, folder, training, previews, node_id, workflow)
            if resume:
                session.resume()
            training.look_for_in_place_changes()
            with checkpointed(model, settings["gradient_checkpointing"], training.in_place):
                session.train()
            losses = _loss_map(session.losses, session.validation)
            return session.finish(), losses, session.chart.finish()
        finally:
            optimizer.restore()


def finished(folder: RunFolder) -> tuple[Path, dict[str, list]]:
    """Return what `run` returned when a run ended: its final delta's file, and the losses.

    Raises:
        ValueError: The run has not ended, or its delta was deleted.
    """
    with contextlib.closing(folder):
        steps = folder.settings["steps"]
        path = output_folder.final_path(folder.path, steps)
        if not path.is_file():
            raise ValueError(
                f"the run {folder.path.name} can neither be resumed nor has it finished: there is "
                f"neither its state nor {path.name}. Choose another one under resume, or {NEW_RUN}"
            )
        logger.info("SaRA Train: %s has finished already; its delta is used", folder.path.name)
        return path, _loss_map(folder.read_losses(steps), folder.read_validation(steps))


def _loss_map(losses: list[float], validation: list[tuple[int, float]]) -> dict[str, list]:
    """Return the losses as ComfyUI's Plot Loss Graph takes them, with the validation beside."""
    return {
        "loss": losses,
        "validation_step": [step for step, _ in validation],
        "validation_loss": [loss for _, loss in validation],
    }


class Session:
    """The part of a run between two stops: makes steps, shows them and saves them."""

    def __init__(
        self,
        patcher,
        examples,
        folder,
        training: TrainingRun,
        previews: Previews,
        node_id: str | None,
        workflow: str | None = None,
    ):
        self.folder, self.training, self.previews = folder, training, previews
        self.settings = folder.settings
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []  # step and loss
        self.progress = host.Progress(training.config.steps, node_id)
        self.chart = LiveChart(
            node_id,
            folder.path.name,
            training.config.steps,
            workflow,
            output_folder.view_subfolder(folder.preview_path(0).parent),
        )
        self._identity = {
            "model": host.architecture(patcher),
            "sampling": host.sampling_summary(patcher),
            "held out": list(training.task.validation),
            **describe_examples(examples),
        }
        self._metadata = _metadata(patcher, self.settings, training.optimizer)
        self._foreign = host.foreign_prediction(patcher)

    def resume(self) -> None:
        """Take over the folder's state.

        Raises:
            ValueError: The model or the pictures are others, or the state is damaged.
        """
        state = self.folder.read_state()
        try:
            wrong = differences(state["identity"], self._identity)
            if wrong:
                raise ValueError(
                    f"{self.folder.path.name} cannot be resumed with what is connected: "
                    f"{'; '.join(wrong)}. Connect the model and pictures it was started with"
                )
            self.training.load_state(state["run"])
            self.losses = state["losses"].tolist()
            self.validation = [tuple(entry) for entry in state["validation"]]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the state of {self.folder.path.name} is damaged: {error!r}"
            ) from error
        self.folder.read_losses(self.training.step)
        self.folder.read_validation(self.training.step)
        self._tell(f"resumed after step {self.training.step}")

    def train(self) -> None:
        """Make the steps that are left. On any end but the last step, save and say so."""
        optimizer = self.training.optimizer
        self._tell(
            f"training {optimizer.num_trainable} of {optimizer.num_considered} weights, those "
            f"below {optimizer.threshold:.4g}, for {self.training.config.steps} steps at a learning "
            f"rate of {optimizer.param_groups[0]['lr']:.3g}, in {self.folder.path}"
        )
        if self._foreign is not None:
            self._tell(
                "the model is trained for {} prediction, which a node before it such as ModelSamplingSD3 "
                "has set; by itself the checkpoint is one for {} prediction".format(*self._foreign)
            )
        stage = optimizer.stage
        rates = [self.training.learning_rate(step) for step in range(self.training.step)]
        self.chart.start(self.losses, rates, self.validation, stage)
        for step, name in self.folder.previews(self.training.step):
            self.chart.add_preview(step, name)
        try:
            self._validate()
            self._preview()
            for report in self.training:
                self.losses.append(report.loss)
                self.folder.add_loss(report)
                self.chart.add(report)
                self._validate()
                self._preview()
                self._show(report)
                every = self.settings["save_every_steps"]
                if report.stage != stage or (every and report.step % every == 0):
                    stage = report.stage
                    self._save()
                self.progress.update(report.step)
        except BaseException as error:
            if is_out_of_memory(error):  # its traceback holds on to the step's activations
                traceback.clear_frames(error.__traceback__)
                host.free_memory()
            text = self._save_at_the_end(type(error).__name__)
            self.chart.stop(text)
            _add_line(error, text)
            raise

    def _validate(self) -> None:
        """Measure the loss on the pictures held out, if it is time and was not done before a stop."""
        step, every = self.training.step, self.settings["validate_every_steps"]
        is_due = step % every == 0 or step == self.training.config.steps
        is_done = bool(self.validation) and self.validation[-1][0] == step
        loss = self.training.validate() if is_due and not is_done else None
        if loss is not None:
            self.validation.append((step, loss))
            self.folder.add_validation(step, loss)
            self.chart.add_validation(step, loss)
            self._tell(f"step {step}: validation loss {loss:.4f}")

    def _preview(self) -> None:
        """Have the model make pictures, if it is time."""
        step = self.training.step
        if not self.previews.is_due(step, self.training.config.steps):
            return
        path, problem = self.previews.make(step)
        if path is None:
            self.chart.mark("error", f"no more previews: {problem}")
            self._tell(f"step {step}: no more previews ({problem}); the training goes on")
        else:
            self.chart.add_preview(step, path.name)

    def finish(self) -> Path:
        """Save the final delta and return its path."""
        steps = self.training.config.steps
        path = output_folder.final_path(self.folder.path, steps)
        delta = self.training.optimizer.delta(self._metadata | self._present())
        try:
            self.folder.finish(delta, path, SAVE_DTYPES[self.settings["save_dtype"]], steps)
        except BaseException as error:
            _add_line(error, self._save_at_the_end(type(error).__name__))
            raise
        logger.info("SaRA Train: saved %s", path)
        return path

    def _present(self) -> dict[str, str]:
        """Return the part of the metadata that changes during the training."""
        told = {"sara.steps": str(self.training.optimizer.num_steps)}
        picture = self.previews.thumbnail
        return told | ({"modelspec.thumbnail": picture} if picture else {})

    def _save(self, wait: bool = False) -> Exception | None:
        losses = torch.tensor(self.losses, dtype=torch.float64)
        try:
            problem = self.folder.save(
                {
                    "run": self.training.state(),
                    "identity": self._identity,
                    "losses": losses,
                    "validation": self.validation,
                },
                self._metadata | self._present(),
                keep=self.settings["keep_checkpoints"],
                dtype=SAVE_DTYPES[self.settings["save_dtype"]],
                wait=wait,
            )
        except Exception as error:  # a save that fails is not to end the training
            problem = error
        if problem is None:
            self.chart.mark("saved", "saved")
        elif not wait:
            self.chart.mark("error", f"could not save: {problem}")
            self._tell(f"could not save ({problem}); the training goes on, free some space")
        return problem

    def _save_at_the_end(self, why: str) -> str:
        step, name = self.training.step, output_folder.output_relative(self.folder.path)
        if step == 0:
            return self._tell(f"stopped by {why} before the first step; nothing was to be saved")
        problem = self._save(wait=True)
        if problem is not None:
            there = (
                f"an earlier save is there; once it can be written to again, choose {name} under "
                "resume in SaRA Train"
                if self.folder.can_resume
                else "there is no earlier save"
            )
            return self._tell(
                f"stopped by {why}; step {step} could not be saved whole in output/sara/{name}: "
                f"{problem}; {there}"
            )
        return self._tell(
            f"stopped by {why}; all {step} steps are saved in output/sara/{name}. To go on, choose "
            f"{name} under resume in SaRA Train"
        )

    def _show(self, report: StepReport) -> None:
        every = max(1, self.training.config.steps // NUM_TEXT_UPDATES)
        if report.skipped:
            self._tell(f"step {report.step} was not finite and changed nothing")
        elif report.step % every == 0:
            mean = sum(self.losses[-every:]) / len(self.losses[-every:])
            self.progress.text(
                f"step {report.step} of {self.training.config.steps}, stage {report.stage}, loss "
                f"{mean:.4f}{self._more(report)}, learning rate {report.learning_rate:.2e}"
            )

    def _more(self, report: StepReport) -> str:
        prior = report.regularisation_loss
        text = "" if prior is None else f", on regularisation pictures {prior:.4f}"
        return text + (f", validation {self.validation[-1][1]:.4f}" if self.validation else "")

    def _tell(self, text: str) -> str:
        logger.info("SaRA Train: %s", text)
        self.folder.log(text)
        self.progress.text(text)
        return f"SaRA Train: {text}"


def _add_line(error: BaseException, line: str) -> None:
    """Add a line to an error's message, keeping its type, which ComfyUI goes by."""
    if is_out_of_memory(error):
        line = f"{line}\n{MEMORY_ADVICE}"
    if isinstance(error, OSError) and error.strerror:
        error.strerror = f"{error.strerror}\n{line}"
        return
    first, *others = error.args or ("",)
    if isinstance(first, str):
        error.args = (f"{first}\n{line}", *others)


def _config(settings: dict, has_empty: bool) -> TrainConfig:
    return TrainConfig(
        steps=settings["steps"],
        batch_size=settings["batch_size"],
        accumulation=settings["grad_accumulation_steps"],
        schedule=settings["lr_schedule"],
        warmup_steps=settings["warmup_steps"],
        max_grad_norm=settings["max_grad_norm"],
        loss=settings["loss_function"],
        caption_dropout=settings["caption_dropout"] if has_empty else 0.0,
        seed=settings["seed"],
        regularisation_weight=settings["regularisation_weight"],
    )


def _optimizer(model: torch.nn.Module, settings: dict) -> SaraAdamW:
    return SaraAdamW(
        model,
        **selection_rule(settings["threshold"], settings["fraction"]),
        lr=settings["learning_rate"] or None,
        weight_decay=settings["weight_decay"],
        low_rank_weight=settings["low_rank_weight"],
        progressive_step=round(settings["progressive"] * settings["steps"]),
        include=settings["include"],
        exclude=settings["exclude"],
        zeros=settings["zeros"],
        seed=settings["seed"],
        moments=settings.get("moments", "fp32"),
    )


def _metadata(patcher, settings: dict, optimizer: SaraAdamW) -> dict[str, str]:
    told = {**settings, "learning_rate": optimizer.param_groups[0]["lr"]}
    words = settings["trigger_words"].strip()
    # The MODEL may carry LoRAs; the file is for the checkpoint below them.
    base = take_fingerprint(host.base_weights(patcher), dict.fromkeys(optimizer.names()))
    return {
        **optimizer.delta_metadata(),
        **({"modelspec.trigger_phrase": words} if words else {}),
        "sara.fingerprint": base,
        "sara.settings": json.dumps(told, sort_keys=True),
        "modelspec.architecture": f"{host.architecture(patcher).lower()}/sara",
        "modelspec.title": settings["output_name"],
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "modelspec.prediction_type": host.noise_schedule(patcher).prediction,
    }
