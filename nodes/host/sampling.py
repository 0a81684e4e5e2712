"""Pictures by ComfyUI's own sampler, of any MODEL and of one that is being trained."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from .encoders import compression
from .execution import check_cancelled
from .families import empty_latent
from .model_calls import ModelCalls

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS


@dataclass(frozen=True)
class Sampling:
    """Settings of a KSampler and a VAE Decode node.

    Attributes:
        latent: LATENT, `samples` of shape `(n, C, ...)`: n pictures are made. None makes one at the
            size the model was trained at.
    """

    vae: Any
    positive: list
    negative: list
    latent: dict | None
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str


def sample(patcher, sampling: Sampling) -> Tensor:
    """Make pictures as KSampler and VAE Decode do. Returns an IMAGE, `(n, H, W, 3)` in `[0, 1]`.

    Random numbers drawn elsewhere do not change by it.

    Raises:
        comfy.model_management.InterruptProcessingException: The user pressed Cancel.
    """
    with _forked_generators(patcher.load_device):
        return _decode(sampling.vae, _sample_latent(patcher, sampling))


def sample_in_training(calls: ModelCalls, sampling: Sampling) -> Tensor:
    """Make pictures, as `sample`, by the model that is being trained, as it is at this moment.

    Its weights stay on their device: it is not loaded again, which might move some of them away, and
    ComfyUI does not see it while the VAE is being loaded, which is unloaded again.

    Raises:
        ValueError: A conditioning carries hooks, which would change the weights in training.
    """
    for name, conditioning in (("positive", sampling.positive), ("negative", sampling.negative)):
        if any("hooks" in options for _, options in conditioning):
            raise ValueError(
                f"the {name} conditioning of the preview carries hooks, which change weights that "
                "are being trained; connect one without hooks to SaRA Sampling"
            )
    patcher = calls.patcher
    with torch.no_grad(), _forked_generators(patcher.load_device), _not_in_training():
        try:
            with _loaded_as_it_is(patcher):
                latent = _sample_latent(patcher, sampling)
        finally:
            patcher.pre_run()  # the sampler's end undoes that of the training
        with _hidden(patcher):
            try:
                return _decode(sampling.vae, latent)
            finally:  # what is left is for the training
                comfy.model_management.unload_all_models()
                comfy.model_management.soft_empty_cache()


def _sample_latent(patcher, sampling: Sampling) -> Tensor:
    _refuse_other_vae(patcher, sampling.vae)
    given = sampling.latent or {"samples": empty_latent(patcher, compression(sampling.vae))}
    latent = comfy.sample.fix_empty_latent_channels(patcher, given["samples"])
    noise = comfy.sample.prepare_noise(latent, sampling.seed, given.get("batch_index"))
    return comfy.sample.sample(
        patcher, noise, sampling.steps, sampling.cfg, sampling.sampler_name, sampling.scheduler,
        sampling.positive, sampling.negative, latent, noise_mask=given.get("noise_mask"),
        callback=lambda *_: check_cancelled(), disable_pbar=True, seed=sampling.seed,
    )  # fmt: skip


def _refuse_other_vae(patcher, vae) -> None:
    """Refuse a VAE whose latents have other channels than the model's.

    Raises:
        ValueError: It is of another family.
    """
    if vae is None:
        raise ValueError("there is no VAE in SaRA Sampling; connect that of the model's checkpoint")
    channels = patcher.get_model_object("latent_format").latent_channels
    if vae.latent_channels != channels:
        raise ValueError(
            f"the VAE connected to SaRA Sampling decodes latents of {vae.latent_channels} channels, but "
            f"this model makes {channels}; connect the VAE of the model's checkpoint"
        )


def _decode(vae, latent: Tensor) -> Tensor:
    pixels = vae.decode(latent)
    return pixels.reshape(-1, *pixels.shape[-3:]).float().cpu()  # of a video, its frames


@contextlib.contextmanager
def _forked_generators(device: torch.device) -> Iterator[None]:
    """Put back the states of the global generators afterwards; sampling seeds them."""
    kind = device.type if device.type in ("cuda", "xpu") else "cuda"
    devices = [device] if device.type == kind else []
    with torch.random.fork_rng(devices, device_type=kind):
        yield


@contextlib.contextmanager
def _not_in_training() -> Iterator[None]:
    """Have models compute as they do when they are used."""
    if not hasattr(comfy.model_management, "in_training"):  # since 0.33
        yield
        return
    before = comfy.model_management.in_training
    comfy.model_management.in_training = False
    try:
        yield
    finally:
        comfy.model_management.in_training = before


@contextlib.contextmanager
def _loaded_as_it_is(patcher) -> Iterator[None]:
    """Have ComfyUI take a MODEL for loaded, however little memory it finds free."""
    patcher.partially_load = lambda *args, **kwargs: 0
    try:
        yield
    finally:
        del patcher.partially_load


@contextlib.contextmanager
def _hidden(patcher) -> Iterator[None]:
    """Keep ComfyUI from unloading a MODEL when it makes room for others."""
    loaded = comfy.model_management.current_loaded_models
    ours = [entry for entry in loaded if entry.model is patcher]
    for entry in ours:
        loaded.remove(entry)
    try:
        yield
    finally:
        loaded[:0] = ours
