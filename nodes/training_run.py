"""One training run: settings in, delta and losses out."""

import json
import logging
import time
from collections.abc import Iterable

import torch

from ..sara_core import SaraAdamW, SparseDelta
from ..sara_core.checkpointing import checkpointed
from ..sara_core.config import TrainConfig
from ..sara_core.fingerprint import take_fingerprint
from ..sara_core.trainer import StepReport, TrainingRun
from . import host
from .inputs import selection_rule
from .training_inputs import COMPUTE_DTYPES
from .training_set import TrainingSet

logger = logging.getLogger("comfyui-sara")

NUM_TEXT_UPDATES = 50


def run(patcher, examples, settings: dict, node_id: str | None) -> tuple[SparseDelta, list[float]]:
    """Train a MODEL in place, put its base weights back, and return what was learned.

    Args:
        patcher: The MODEL.
        examples: Latents, captions and the empty caption (or None), one of each per picture.
        settings: The node's widgets.
        node_id: Node that shows the progress.

    Returns:
        The delta in the precision it is saved in, and the loss of each step.
    """
    dtype = COMPUTE_DTYPES[settings["training_dtype"]]
    config = _config(settings, has_empty=examples[2] is not None)
    with host.trainable(patcher, dtype) as calls:
        training_set = TrainingSet(calls, *examples)
        model = calls.model.diffusion_model
        scaler = None
        if host.needs_loss_scaling(patcher, dtype):
            scaler = torch.amp.GradScaler(calls.device.type)
        optimizer = _optimizer(model, settings)
        try:
            peak_rate = optimizer.param_groups[0]["lr"]
            logger.info(
                "SaRA Train: %d of %d weights, those below %.4g, for %d steps at a learning rate "
                "of %.3g",
                optimizer.num_trainable,
                optimizer.num_considered,
                optimizer.threshold,
                config.steps,
                peak_rate,
            )
            with checkpointed(model, settings["gradient_checkpointing"]):
                losses = _loop(
                    TrainingRun(optimizer, training_set, config, scaler), config, node_id
                )
            delta = optimizer.delta(_metadata(patcher, settings, peak_rate, len(examples[0])))
        finally:
            optimizer.restore()
    # The MODEL may carry LoRAs; the file is for the checkpoint below them.
    base = take_fingerprint(host.base_weights(patcher), delta.entries)
    return SparseDelta(delta.entries, {**delta.metadata, "sara.fingerprint": base}), losses


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
    )


def _loop(reports: Iterable[StepReport], config: TrainConfig, node_id: str | None) -> list[float]:
    progress = host.Progress(config.steps, node_id)
    losses = []
    text_every = max(1, config.steps // NUM_TEXT_UPDATES)
    for report in reports:
        losses.append(report.loss)
        if report.step % text_every == 0:
            mean = sum(losses[-text_every:]) / text_every
            progress.text(
                f"step {report.step} of {config.steps}, stage {report.stage}, loss {mean:.4f}, "
                f"learning rate {report.learning_rate:.2e}"
            )
        progress.update(report.step)
    return losses


def _metadata(patcher, settings: dict, peak_rate: float, num_pictures: int) -> dict[str, str]:
    told = {**settings, "learning_rate": peak_rate, "num_pictures": num_pictures}
    return {
        "sara.settings": json.dumps(told, sort_keys=True),
        "modelspec.architecture": f"{host.architecture(patcher).lower()}/sara",
        "modelspec.title": settings["output_name"],
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "modelspec.prediction_type": host.noise_schedule(patcher).prediction,
    }
