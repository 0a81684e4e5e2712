"""How a run ended, in words."""

import contextlib
import math
from collections.abc import Iterator, Sequence

from ...sara_core.training.out_of_memory import is_out_of_memory
from ...sara_core.training.processes import OtherProcessFailed
from .. import host

MEMORY_ADVICE = (
    "To need less memory: turn gradient_checkpointing on, lower batch_size, use smaller pictures, "
    "train a smaller fraction, set optimizer_moments to 8bit (of adamw), turn offloading on, set trained_in to main memory."
)


def refuse_unlearned(num_updates: int) -> None:
    """Raise if a run has made all its steps, but none of them counted.

    Raises:
        FloatingPointError: No update was made.
    """
    if not num_updates:
        raise FloatingPointError(
            "the loss or its gradient was not finite in any step, so nothing was learned; compute in "
            "fp32 or bf16 if training_dtype is fp16, or lower the learning rate"
        )


def worse_than_it_began(losses: Sequence[float]) -> str | None:
    """Say so if the last quarter of the losses is far above the first tenth; None if not.

    Single losses of a diffusion model differ by a factor of ten with the noise they draw, so that few
    of them say little.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    begun, ended = finite[: len(finite) // 10], finite[-(len(finite) // 4) :]
    if not begun:
        return None
    first, last = (sum(part) / len(part) for part in (begun, ended))
    if last <= first * (2 if len(begun) >= 10 else 10):
        return None
    return (
        f"the loss rose from {first:.3g} to {last:.3g}: the model got worse instead of learning. Lower "
        "the learning rate"
    )


def how_it_ended(error: BaseException) -> str:
    """Say in a word or two what ended a run."""
    if isinstance(error, (host.Cancelled, KeyboardInterrupt)) or is_cancelled_elsewhere(error):
        return "cancelled"
    return f"stopped by {'lack of memory' if is_out_of_memory(error) else type(error).__name__}"


def is_cancelled_elsewhere(error: BaseException) -> bool:
    """Tell whether all that happened is that another process was cancelled first."""
    return isinstance(error, OtherProcessFailed) and error.kinds == {host.Cancelled.__name__}


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Let this process be cancelled where another one was."""
    try:
        yield
    except OtherProcessFailed as error:
        if is_cancelled_elsewhere(error):
            raise host.Cancelled from error
        raise


def add_line(error: BaseException, line: str) -> None:
    """Add a line to an error's message, keeping its type, which ComfyUI goes by."""
    if is_out_of_memory(error):
        line = f"{line}\n{MEMORY_ADVICE}"
    if isinstance(error, OSError) and error.strerror:
        error.strerror = f"{error.strerror}\n{line}"
        return
    first, *others = error.args or ("",)
    if isinstance(first, str):
        error.args = (f"{first}\n{line}", *others)
