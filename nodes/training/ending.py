"""How a run ended, in words."""

from ...sara_core.training.out_of_memory import is_out_of_memory
from .. import host

MEMORY_ADVICE = (
    "To need less memory: turn gradient_checkpointing on, lower batch_size, use smaller pictures, "
    "train a smaller fraction, set moments to 8bit, turn offloading on."
)


def how_it_ended(error: BaseException) -> str:
    """Say in a word or two what ended a run."""
    if isinstance(error, (host.Cancelled, KeyboardInterrupt)):
        return "cancelled"
    return f"stopped by {'lack of memory' if is_out_of_memory(error) else type(error).__name__}"


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
