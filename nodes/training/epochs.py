"""How often a run goes over its pictures."""

import dataclasses

from ...sara_core.training.batches import batches_in_epoch
from ...sara_core.training.run_settings import RunSettings
from .examples import Examples, split_validation


def epochs_of(settings: RunSettings, examples: Examples, batch_size: int) -> float:
    """Return how often a run goes over its pictures, in batches of all processes together."""
    count = settings.steps * batch_size * settings.grad_accumulation_steps
    return count / max(1, examples.num_to_learn * (1 - settings.validation_split))


def with_steps(settings: RunSettings, examples: Examples, num_processes: int) -> RunSettings:
    """Return settings whose steps are as many as their epochs take, if they go by epochs.

    A batch holds pictures of one size only, and the last one of each size may be smaller, so that more
    sizes take more steps.
    """
    if not settings.epochs:
        return settings
    training, _ = split_validation(examples, settings.validation_split, settings.seed)
    keys = [latent.shape for latent in examples.latents]
    batches = batches_in_epoch(keys, settings.batch_size * num_processes, training)
    steps = -(-settings.epochs * batches // settings.grad_accumulation_steps)
    return dataclasses.replace(settings, steps=steps)
