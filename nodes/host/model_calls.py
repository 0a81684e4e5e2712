"""A MODEL called with one caption per sample."""

import comfy.conds
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...sara_core.training.inference_tensors import is_tracked, map_tensors, trackable_copy
from ...sara_core.weights.to_device import send
from .attention import with_gradients
from .families import takes_guidance
from .schedules import noise_schedule
from .weights import architecture, device_of

# What latents are of, by the dimensions beside batch and channels.
KINDS = {1: "sound, (1, C, length)", 2: "pictures, (1, C, h, w)", 3: "videos, (1, C, frames, h, w)"}
# Of a conditioning that counts everywhere and in all steps.
WHOLE = {"start_percent": 0.0, "end_percent": 1.0, "strength": 1.0}


class ModelCalls:
    """Calls a MODEL with one caption per sample, in the model's own conditioning format.

    ComfyUI's guiders apply every caption to the whole batch; training needs picture, caption and
    noise level to stay together.

    Args:
        patcher: The MODEL.
        wrappers: Around its calls, as `transformer_options` hold them.

    Attributes:
        guidance: Value that a model which takes one is given, where captions carry none; None leaves
            ComfyUI's.
    """

    def __init__(self, patcher, wrappers: dict | None = None):
        self.patcher, self._wrappers = patcher, wrappers or {}
        self.guidance: float | None = None
        self.model = patcher.model
        self.device = device_of(patcher)
        self.schedule = noise_schedule(patcher)

    def prepare_latent(self, latent: Tensor) -> Tensor:
        """Scale a latent `(1, C, ...)` as the model expects it, float32, on the CPU.

        A picture for a model of videos becomes a video of one frame, as in KSampler, and the other way
        round.

        Raises:
            ValueError: Other channels than the model's, or frames that it cannot take.
        """
        format = self.model.latent_format
        channels, dimensions = format.latent_channels, format.latent_dimensions
        if dimensions == 3 and latent.dim() == 4:
            latent = latent.unsqueeze(2)
        elif dimensions == 2 and latent.dim() == 5 and latent.shape[2] == 1:
            latent = latent.squeeze(2)
        if latent.dim() != dimensions + 2:
            raise ValueError(
                f"a latent has the shape {tuple(latent.shape)} but this {architecture(self.patcher)} "
                f"model takes {KINDS[dimensions]}; encode the pictures with the VAE of the same "
                "checkpoint"
            )
        if latent.shape[1] != channels:
            raise ValueError(
                f"a latent has {latent.shape[1]} channels but this {architecture(self.patcher)} "
                f"model takes {channels}; encode the pictures with the VAE of the same checkpoint"
            )
        return self.model.process_latent_in(latent.clone().float().cpu())

    def encode_captions(self, captions: list[list], latents: list[Tensor]) -> list[dict]:
        """Turn conditioning pairs into the model's keyword arguments, for one sample each.

        Raises:
            ValueError: A conditioning that carries a ControlNet, a mask or a range of steps.
        """
        encoded = []
        copies: dict[tuple, list] = {}  # repeats and windows of a picture share their caption
        texts: dict[int, Tensor] = {}  # and captions their text
        for (cross_attention, options), latent in zip(captions, latents, strict=True):
            unusable = {"control", "mask", "area", "hooks", "gligen"} & options.keys()
            unusable |= {key for key, whole in WHOLE.items() if options.get(key, whole) != whole}
            if unusable:
                raise ValueError(
                    f"a caption's conditioning carries {', '.join(sorted(unusable))}, which SaRA "
                    "Train cannot use; connect it straight from CLIP Text Encode"
                )
            which = id(cross_attention), id(options)
            if which not in copies:
                if id(cross_attention) not in texts:
                    texts[id(cross_attention)] = trackable_copy(cross_attention)
                copies[which] = [texts[id(cross_attention)], trackable_copy(options)]
                if self.guidance is not None and takes_guidance(self.patcher):
                    copies[which][1].setdefault("guidance", self.guidance)
            pair = copies[which]
            conds = comfy.sampler_helpers.convert_cond([pair])
            conds = comfy.samplers.encode_model_conds(
                self.model.extra_conds, conds, latent, torch.device("cpu"), "positive",
                latent_image=latent, denoise_mask=None, seed=None,
            )  # fmt: skip
            encoded.append(
                {
                    name: _trackable(cond.process_cond(batch_size=1, area=None))
                    for name, cond in conds[0]["model_conds"].items()
                }
            )
        return encoded

    def denoise(self, noisy: Tensor, sigma: Tensor, captions: list[dict]) -> Tensor:
        """Estimate the clean latents of a batch, shape of `noisy`, in one pass per caption shape.

        Captions of unequal length would have to be padded to share a pass, which changes what the
        model sees; they are passed in groups instead.
        """
        groups: dict[str, list[int]] = {}
        for i, caption in enumerate(captions):
            groups.setdefault(_signature(caption), []).append(i)
        if len(groups) == 1:
            return self._denoise_group(noisy, sigma, captions)
        order = torch.tensor([i for members in groups.values() for i in members])
        there, back = send(order, noisy.device), send(torch.argsort(order), noisy.device)
        counts = [len(members) for members in groups.values()]
        parts = zip(noisy[there].split(counts), sigma[there].split(counts), strict=True)
        outputs = [
            self._denoise_group(*part, [captions[i] for i in members])
            for part, members in zip(parts, groups.values(), strict=True)
        ]
        return torch.cat(outputs)[back]

    def _denoise_group(self, noisy: Tensor, sigma: Tensor, captions: list[dict]) -> Tensor:
        _forget_last_step()
        conds = comfy.samplers.cond_cat(captions)
        options = with_gradients(self.patcher.model_options["transformer_options"])
        options.update(cond_or_uncond=[0], sigmas=sigma)
        if self._wrappers:
            options["wrappers"] = self._wrappers
        return self.model.apply_model(noisy, sigma, **conds, transformer_options=options)


def size_of(caption: dict) -> int:
    """Return how many numbers a caption's conditioning holds, as `encode_captions` returns it."""
    leaves = tree_leaves([cond.cond for cond in caption.values()])
    return sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))


def _trackable(cond):
    """Replace what autograd cannot save, of objects that options held, such as a picture's CLIP features."""
    tensors = map_tensors(
        cond.cond, lambda tensor: tensor if is_tracked(tensor) else tensor.clone()
    )
    return cond._copy_with(tensors)


def _forget_last_step() -> None:
    """Drop what modules keep from one sampling step to the next, which would keep its gradients too."""
    keepers = getattr(comfy.model_management, "CROSS_STEP_STATE", set())  # since 0.33
    for module in keepers:
        del module._comfy_cross_step_state
    keepers.clear()


def _signature(caption: dict) -> str:
    """Describe the shapes of a caption's conditioning; equal ones can share a pass."""
    parts = []
    for name, cond in sorted(caption.items()):
        if isinstance(cond, comfy.conds.CONDConstant):
            told = cond.cond
        elif isinstance(cond, comfy.conds.CONDList):  # its size is that of all together
            told = [tuple(tensor.shape) for tensor in cond.cond]
        else:
            told = cond.size()
        parts.append(f"{name}:{told}")
    return "|".join(parts)
