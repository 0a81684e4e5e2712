"""What memory a run will need, said before its first step, and what would make it fit."""

import dataclasses
import traceback

from ...sara_core.optimizer import packages
from ...sara_core.optimizer.adam_moments import BYTES
from ...sara_core.training.gradient_checkpointing import checkpointed
from ...sara_core.training.memory_need import MemoryNeed
from ...sara_core.training.out_of_memory import is_out_of_memory
from ...sara_core.training.run_settings import RunSettings
from ...sara_core.training.trainer import TrainingRun
from ...sara_core.weights.quantised import bytes_on, keep_on_device
from .. import host
from .ending import MEMORY_ADVICE
from .reporter import Reporter

GRADIENT = 4  # bytes of a trained weight that come and go with each step
AVERAGE = 4  # bytes of a trained weight for its average
RATE = 1  # byte of a trained weight for a rate of its own
PASSING = 8  # bytes of a trained weight that a package's optimizer takes within an update
GIB = 1024**3
LEFT_FREE = GIB  # of what could hold weights: for previews, and for what is not seen of kernels


def announce(
    calls: "host.ModelCalls", training: TrainingRun, reporter: Reporter
) -> MemoryNeed | None:
    """Say what memory a run needs, and if that is more than there is, what would make it fit.

    Args:
        calls: The MODEL, loaded for training.
        training: The loop, before its first step or on a resumed run.
        reporter: Shows it.

    Returns:
        The need; None if it cannot be told, or not even one picture fits.
    """
    settings = reporter.folder.settings
    if not host.memory_in_use()[1]:  # it cannot be read
        return None
    need = measure(calls, training, settings)
    if need is None:
        reporter.warn(f"memory: not even one picture fits. {MEMORY_ADVICE}")
        return None
    reporter.chart.memory_need = {
        "base": need.base, "trained": need.trained, "activations": need.activations,
    }  # fmt: skip
    reporter.say(in_words(need))
    if not need.fits:
        ways = "; ".join(remedies(need, settings, calls, training))
        reporter.warn(f"{in_words(need)}. This is more than there is. To need less: {ways}")
    return need


def keep_what_fits(calls: "host.ModelCalls", settings: RunSettings, need: MemoryNeed | None) -> str:
    """Have as many of the weights that wait in main memory stay on the device as are asked for, or fit.

    Args:
        calls: The MODEL, loaded for training with offloading.
        settings: Of the run.
        need: What it needs with none of them on the device; None keeps none unless so many are asked for.

    Returns:
        What was done, in words.
    """
    model = calls.model.diffusion_model
    budget = settings.weights_on_device * GIB
    if budget < 0:
        budget = 0 if need is None else max(0, need.free - need.total - LEFT_FREE)
    keep_on_device(model, budget)
    sizes = [(bytes_on(p.device, p), p) for p in model.parameters()]
    sent = sum(p.source.stored.nbytes for size, p in sizes if not size)
    return (
        f"offloading: {_size(sum(size for size, _ in sizes))} of the weights stay on the device, "
        f"{_size(sent)} are sent when they are used"
    )


def measure(
    calls: "host.ModelCalls", training: TrainingRun, settings: RunSettings
) -> MemoryNeed | None:
    """Find what a run needs, by passes over one picture and over a batch, or two where that is much.

    Returns:
        It, or None if not even one picture fits.
    """
    optimizer, device = training.optimizer, calls.device
    base = sum(bytes_on(device, p) for p in calls.model.parameters())
    count = sum(leaf.numel() for leaf in optimizer.parameters() if leaf.device == device)
    kept = BYTES[settings.moments] + (AVERAGE if settings.ema_decay else 0)
    kept = packages.BYTES.get(settings.optimizer, kept)
    to_come = GRADIENT + (0 if optimizer.state else kept)
    trained = count * (host.bytes_per_trained_weight(calls.patcher) - BYTES["fp32"] + kept)
    trained += count * (RATE if optimizer.has_weight_rates else 0)
    used, total = host.memory_in_use()
    free = total - used + base + trained - count * to_come
    one = _rehearsed(training, 1)
    if one is None:
        return None
    passing = count * (PASSING if settings.optimizer != packages.ADAMW else 0)
    least = max(0, one - count * GRADIENT, passing)
    need = MemoryNeed(base, trained, least, one, free, 1)
    size = settings.batch_size
    if size == 1:
        return need
    tried = size if base + trained + size * one <= free else 2
    both = _rehearsed(training, tried)
    picture = one if both is None else max(0, both - one) // (tried - 1)
    return dataclasses.replace(need, picture=picture).with_batch(size)


def _rehearsed(training: TrainingRun, count: int) -> int | None:
    """Return what a pass takes, or None if memory runs out."""
    try:
        return training.rehearse(count)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
    host.free_memory()
    return None


def in_words(need: MemoryNeed) -> str:
    """Say what a run needs and of what it is made."""
    return (
        f"memory: about {_size(need.total)} of {_size(need.free)} free: model {_size(need.base)}, "
        f"trained weights {_size(need.trained)}, activations {_size(need.activations)} at batch size "
        f"{need.batch_size}"
    )


def remedies(
    need: MemoryNeed, settings: RunSettings, calls: "host.ModelCalls", training: TrainingRun
) -> list[str]:
    """Say what would lower the need, and to how much, what changes nothing learned first.

    Args:
        need: What does not fit.
        settings: Of the run.
        calls: The MODEL, loaded for training.
        training: The loop; one picture is gone over once more if blocks are not checkpointed.
    """
    found = []
    if not settings.gradient_checkpointing:
        with checkpointed(calls.model.diffusion_model, in_place=training.in_place):
            one = _rehearsed(training, 1)
        if one is not None:
            least = min(need.activations, one * need.batch_size)
            found.append(("turn gradient_checkpointing on", need.total - need.activations + least))
    if settings.moments == "fp32" and settings.optimizer == packages.ADAMW:
        saved = (BYTES["fp32"] - BYTES["8bit"]) * training.optimizer.num_trainable
        found.append(("set optimizer_moments to 8bit", need.total - saved))
    if batch := need.largest_batch():
        found.append((f"set batch_size to {batch}", need.with_batch(batch).total))
    elif need.batch_size > 1:
        found.append(("set batch_size to 1", need.with_batch(1).total))
    if not settings.offloading:
        found.append(("turn offloading on", need.total - need.base))
    if settings.trained_in == "device":
        found.append(("set trained_in to main memory", need.total - need.trained))
    if area := need.largest_area():
        found.append((f"make pictures {area**0.5:.0%} as wide and high", need.free))
    return [f"{what} (about {_size(total)})" for what, total in found]


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GB" if count >= GIB / 10 else f"{count / 1024**2:.0f} MB"
