"""The training loop: draw pictures and noise, ask the model, update."""

import logging
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..delta.sparse_delta import SparseDelta
from ..optimizer.learning_rate import factor
from ..optimizer.packages import SCHEDULE_FREE
from ..optimizer.sara_adamw import SaraAdamW
from ..optimizer.updates import clip_
from .batches import by_key
from .config import TrainConfig
from .draws import Draws
from .held_out import HeldOut
from .memory_need import most_bytes
from .noise_tally import NoiseTally
from .out_of_memory import is_out_of_memory
from .passes import Passes
from .processes import ENOUGH, FINE, NO_MEMORY, Processes
from .task import StepReport, TrainingTask

logger = logging.getLogger("comfyui-sara")

MAX_BAD_STEPS = 5


class TrainingRun:
    """A run that can stop after any step and go on elsewhere as if it had not.

    Iterating makes one update at a time until `config.last_step` are made, or until `end`. Every
    random number comes from a CPU generator seeded with `config.seed`, so a run does not depend on the
    device's generator, and the global one is not touched.

    Where the optimizer averages over processes, every one of them makes the same steps: a batch is as
    many times larger as there are processes, and each goes over its share of it, so that all learn what
    one would with the whole batch. A run that goes on in more or fewer processes keeps its batches. An
    error in one ends all; where memory runs out in one, all go on in parts.

    Each step waits for the device once, before its update, to leave out one that is not finite; the loss is
    read back at the same time. A scaler, and processes that agree, wait once more each.

    Args:
        optimizer: Holds the weights that train; its learning rate is the peak of the schedule.
        task: Model and pictures.
        config: Settings.
        scaler: Scales the loss where gradients are float16; an overflow it finds is not counted as
            a bad step.
        free_memory: Called before a step is tried again after memory has run out.
        processes: Those that train together; by default they agree on the device of the gradients.

    Attributes:
        processes: Those that train together.
        peak_rate: Learning rate at the top of the present course.

    Raises:
        FloatingPointError: While iterating: MAX_BAD_STEPS steps in a row were not finite.
    """

    def __init__(
        self,
        optimizer: SaraAdamW,
        task: TrainingTask,
        config: TrainConfig,
        scaler: torch.amp.GradScaler | None = None,
        free_memory: Callable[[], None] = lambda: None,
        processes: Processes | None = None,
    ):
        self.optimizer, self.task, self.config, self.scaler = optimizer, task, config, scaler
        self.step = 0
        self.passes = Passes(task, config, scaler)
        self.noise_tally = NoiseTally(task.schedule)
        self._free_memory = free_memory
        own = Processes(optimizer.parameters()[0].device, optimizer.distributed)
        self.processes = processes or own
        self._draws = Draws(task, config, self.passes, self.processes)
        self._held_out = HeldOut(task, self.passes, free_memory)
        self.peak_rate = optimizer.param_groups[0]["lr"]
        self._bad_steps = 0
        self._half_made = False
        self._is_enough = False
        self._mark()

    def end(self) -> None:
        """Make no more updates, in no process, after those that were made."""
        self._is_enough = True

    @property
    def batch_size(self) -> int:
        """Pictures of a batch, in all processes."""
        return self._draws.batch_size

    @property
    def in_place(self) -> bool:
        """See `look_for_in_place_changes`."""
        return self.passes.in_place

    def __iter__(self) -> Iterator[StepReport]:
        while self.step < self.config.last_step:
            report = self._make_step()
            if report is None:
                return
            yield report
            if self._bad_steps >= MAX_BAD_STEPS:
                raise FloatingPointError(
                    f"the loss or its gradient was not finite in {MAX_BAD_STEPS} steps in a row, up "
                    f"to step {report.step}; none of them changed a weight. Lower the learning rate "
                    f"(it was {report.learning_rate:.2e}), or compute in fp32 or bf16 if "
                    "training_dtype is fp16"
                )

    def state(self) -> dict:
        """Return what is needed to go on after the last whole step: tensors and plain values.

        Raises:
            RuntimeError: An error has struck within an update, so the weights are of no whole step.
        """
        if self._half_made:
            raise RuntimeError("an error struck in the middle of an update")
        (generator, remaining), num_parts, _ = self._marked
        return {
            "step": self.step,
            "generator": generator,
            "remaining": remaining,
            "peak_rate": self.peak_rate,
            "batch": self.batch_size,
            "num_parts": num_parts,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict) -> None:
        """Go on from a state of a run with the same model, pictures and settings.

        Raises:
            ValueError: It does not fit the model; nothing has been changed then.
        """
        self._draws.refuse_others(state["remaining"])
        progressive_step = self.optimizer.progressive_step
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.progressive_step = (
            progressive_step  # as the settings have it, also of more steps
        )
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        if not 0 < self.step == self.config.schedule_start:  # else a new course begins here
            self.peak_rate = state["peak_rate"]
        self.passes.num_parts, self._bad_steps = state["num_parts"], 0
        self._draws.set_batches(state.get("batch", self.config.batch_size))
        self._draws.go_to(state["generator"], state["remaining"])
        self._mark()

    def load_delta(self, delta: SparseDelta) -> None:
        """Go on at `config.schedule_start` from what a delta has learned, with new random numbers.

        Raises:
            ValueError: It does not fit the model or the selection; nothing has been changed then.
        """
        self.optimizer.start_from(delta, self.config.schedule_start)
        self.step = self.config.schedule_start
        self._draws.seed((self.config.seed + self.step) % (1 << 64))
        self._mark()

    def look_for_in_place_changes(self) -> None:
        """Set `in_place` by one forward pass, before blocks are checkpointed; see `Passes`."""
        self.passes.look_for_in_place_changes()

    def rehearse(self, count: int) -> int:
        """Return the most bytes that a forward and backward pass over so many pictures takes.

        They are those with the largest latents, each with its longest caption. Neither gradients nor random numbers of the run are
        touched.
        """
        keys = by_key(self.task.keys, [*self.task.training, *self.task.regularisation])
        largest = max(keys.values(), key=lambda bucket: self.task.latents(bucket[:1]).numel())
        pictures = [largest[i % len(largest)] for i in range(count)]

        def go_over() -> None:
            *draw, _ = self.passes.draw(pictures, torch.Generator())
            longest = [self.task.longest_caption(picture) for picture in pictures]
            self.passes.backward((*draw, longest), 1.0)

        try:
            device = self.task.latents(pictures[:1]).device
            with self.optimizer.no_sync():
                return most_bytes(device, go_over)
        finally:
            self.optimizer.zero_grad()

    def validate(self) -> float | None:
        """Return the loss on the pictures held out, at the same noise every time; None without any.

        It is that of the average of the trained values, where the optimizer keeps one.
        The run's own random numbers are not touched. Where memory runs out, pictures are measured in smaller parts.
        """
        return self._held_out.loss(self.batch_size, lambda: self.optimizer.at_strength(1.0))

    def _mark(self) -> None:
        self._marked = (
            self._draws.mark(),
            self.passes.num_parts,
            self.optimizer.generator.get_state(),
        )

    def _rewind(self) -> None:
        self.noise_tally.forget()
        self.optimizer.zero_grad()
        drawn, self.passes.num_parts, low_rank_draws = self._marked
        self._draws.go_to(*drawn)
        self.optimizer.generator.set_state(low_rank_draws)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, on the present course."""
        config, start = self.config, self.config.schedule_start
        return self.peak_rate * factor(
            step - start,
            config.steps - start,
            "constant" if self.optimizer.optimizer == SCHEDULE_FREE else config.lr_schedule,
            config.warmup_steps,
            config.lr_cycles,
        )

    def _make_step(self) -> StepReport | None:
        """Make an update; returns None instead if a process has asked to `end`."""
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(self.step)
        try:
            losses = self._gradients_within_memory()
            if losses is None:
                self._rewind()
                return None
            (loss, *prior), finite = self._update(losses)
        except BaseException as error:
            self._rewind()
            self.processes.fail(error)
            raise
        self.step += 1
        self.noise_tally.count()
        self._mark()
        return StepReport(
            self.step, loss, self.optimizer.rate_in_use, self.optimizer.stage, not finite,
            prior[0] if prior else None,
        )  # fmt: skip

    def _gradients_within_memory(self) -> Tensor | None:
        share = -(-self.batch_size // self.processes.size)
        while True:
            if self._is_enough:
                self.processes.agree(ENOUGH)
                return None
            losses: Tensor | None = None
            try:
                losses = self._draws.backward(self.noise_tally, self.optimizer.no_sync)
            except Exception as error:
                if not is_out_of_memory(error) or self.passes.num_parts >= share:
                    raise
            worst = self.processes.agree(NO_MEMORY if losses is None else FINE)
            if worst == ENOUGH:
                return None
            if worst == FINE and losses is not None:
                self.optimizer.average_gradients()
                return self.processes.sum(losses)
            # Outside the except block, where the error no longer keeps the step's tensors alive.
            num_parts = min(2 * self.passes.num_parts, share)
            self._rewind()
            self._free_memory()
            self.passes.num_parts = num_parts
            logger.warning(
                "memory ran out in step %d; going on with each batch in %d parts, with the same result",
                self.step + 1, num_parts,
            )  # fmt: skip

    def _update(self, losses: Tensor) -> tuple[list[float], bool]:
        """Make the update unless it is not finite; returns the losses, and whether it was."""
        optimizer, scaler = self.optimizer, self.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        optimizer.add_low_rank_gradient_()
        limit = self.config.max_grad_norm or float("inf")
        norm = clip_(optimizer.parameters(), limit)
        is_finite = torch.isfinite(losses.sum()) & torch.isfinite(norm)
        *found, told = torch.cat([losses, is_finite.to(losses)[None]]).tolist()
        finite = bool(told)
        self._half_made = True
        if finite:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        self._half_made = False
        # Overflows are the scaler's way to find its scale, unless there is nothing left to find.
        is_search = not finite and scaler is not None and scaler.get_scale() >= 1
        if finite or not (is_search and math.isfinite(sum(found))):
            self._bad_steps = 0 if finite else self._bad_steps + 1
        optimizer.zero_grad()
        return found, finite
