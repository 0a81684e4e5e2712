"""Deltas as patches and hooks of a MODEL."""

import functools
import logging
import weakref
from collections import Counter

import comfy.hooks
import torch
from comfy.patcher_extension import CallbacksMP
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ...sara_core import SparseDelta
from ...sara_core.weights import at_positions
from .weights import (
    PREFIX,
    BaseWeights,
    architecture,
    base_weights,
    is_dynamic,
    is_ggml,
    is_quantised,
    patchable_names,
    patched_weights,
)

logger = logging.getLogger("comfyui-sara")

SMALL_LAYER = 16 * 1024  # bytes


class SparseAdapter(WeightAdapterBase):
    """Adds a delta's entry to the weight it is called with; nothing dense is built."""

    name = "sara"

    def __init__(self, loaded_keys: set[str], weights: list[Tensor]):
        # 0.33 makes copies of an adapter on the GPU by this signature.
        self.loaded_keys = loaded_keys
        self.weights = weights  # positions and values of a DeltaEntry

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function,
        intermediate_dtype=torch.float32, original_weight=None,
    ):  # fmt: skip
        """Add `strength * values` in place; ComfyUI passes a copy of the weight."""
        index, values = (tensor.to(weight.device) for tensor in self.weights)
        index = index.long()  # once for both
        changed = at_positions.read(weight, index).float() + values.float() * strength
        return at_positions.write_(weight, index, changed.to(weight.dtype))


class SparseAddition:
    """Adds a delta's entry to an 8-bit weight whenever it is used, after it was turned into numbers.

    Patched in, small changes would be lost: float8's steps near zero are as large as they are.

    Args:
        index: Flat positions, `(k,)`.
        values: What is added at strength 1, `(k,)`.
        strength: Factor.
        module: The layer; where it has a `scale_weight`, the weight comes divided by it.
    """

    name = "sara"

    def __init__(self, index: Tensor, values: Tensor, strength: float, module: torch.nn.Module):
        self.index, self.values, self.strength = index, values, strength
        self._module = weakref.ref(module)
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def move_to(self, device) -> int:
        """Have a copy where the weight is; returns the bytes it takes there."""
        self.forget()
        return sum(tensor.nbytes for tensor in self._on(torch.device(device)))

    def forget(self) -> None:
        """Let go of the copies on devices; they are made again when needed."""
        self._copies.clear()

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device == self.index.device:
            return self.index, self.values
        if device not in self._copies:
            self._copies[device] = self.index.to(device), self.values.to(device)
        return self._copies[device]

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the changed weight; the one given may be the layer's own and is left alone."""
        index, values = self._on(weight.device)
        values = values.float() * self.strength
        scale = getattr(self._module(), "scale_weight", None)
        if scale is not None:
            values = values / scale.to(values)
        if weight.element_size() == 1:  # the fast matrix product takes nothing else
            _warn_of_rounding()
            flat = weight.reshape(-1).float().index_add(0, index, values)
            return flat.to(weight.dtype).view_as(weight)
        return weight.reshape(-1).index_add(0, index, values.to(weight.dtype)).view_as(weight)


@functools.cache
def _warn_of_rounding() -> None:
    logger.warning(
        "Apply SaRA: with fast float8 matrix products the delta is rounded to float8 and loses much "
        "of its effect; start ComfyUI without --fast fp8_matrix_mult"
    )


class ZeroSmallWeights(WeightAdapterBase):
    """Zeroes the weights below a threshold, to show that they hardly matter."""

    name = "sara_zero"

    def __init__(self, loaded_keys: set[str], weights: list[float]):
        self.loaded_keys = loaded_keys
        self.weights = weights  # the threshold

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function,
        intermediate_dtype=torch.float32, original_weight=None,
    ):  # fmt: skip
        """Zero the small weights in place."""
        return weight.masked_fill_(weight.float().abs() < self.weights[0], 0)


def apply_delta(patcher, delta: SparseDelta, strength: float):
    """Return a MODEL with the delta patched in; strength 0 adds no patch.

    Raises:
        ValueError: The delta changes parameters the model lacks or has in other shapes.
    """
    patched = patcher.clone()
    weights = base_weights(patcher)
    _refuse_other_shapes(patcher, delta, weights)
    # It may have been trained with a LoRA or merge that the MODEL carries.
    if not (delta.fits_base(weights) or delta.fits_base(patched_weights(patcher))):
        logger.warning(
            "Apply SaRA: this delta was trained on another base than the loaded checkpoint. Shapes "
            "fit, so it is applied, but the result may differ from what was trained"
        )
    patchable = patchable_names(patcher.model.diffusion_model)
    lost = delta.entries.keys() - patchable
    if lost:
        logger.warning(
            "Apply SaRA: ComfyUI cannot patch %d of this delta's %d layers, such as %s; what they "
            "learned has no effect",
            len(lost),
            len(delta.entries),
            min(lost),
        )
    adapters, additions = {}, []
    for name, entry in delta.entries.items() if strength else ():
        if name in patchable and _is_added_when_used(patcher, weights.stored[name]):
            module = patcher.model.diffusion_model.get_submodule(name.rpartition(".")[0])
            additions.append(SparseAddition(entry.index, entry.values, strength, module))
            patched.add_weight_wrapper(PREFIX + name, additions[-1])
        else:
            adapters[PREFIX + name] = SparseAdapter(set(), [entry.index, entry.values])
    if additions:
        patched.add_callback(
            CallbacksMP.ON_DETACH, lambda *_: [addition.forget() for addition in additions]
        )
    patched.add_patches(adapters, strength)
    return patched


def patches_carried(patcher) -> str:
    """Say which patches a MODEL carries, such as `lora on 128 parameters`; empty for none."""
    kinds: Counter[str] = Counter()
    found = [(key, [patch[1] for patch in patches]) for key, patches in patcher.patches.items()]
    for key, patches in (*found, *patcher.weight_wrapper_patches.items()):
        if key.startswith(PREFIX):
            kinds.update({_kind(patch) for patch in patches})
    return ", ".join(f"{kind} on {count} parameters" for kind, count in kinds.items())


def _kind(patch: object) -> str:
    """Name a patch: an adapter by its name, a tuple by its first word; of merges it is a weight."""
    first = patch[0] if isinstance(patch, (tuple, list)) and patch else None
    return getattr(patch, "name", None) or (first if isinstance(first, str) else "merge")


def _is_added_when_used(patcher, weight: Tensor) -> bool:
    """Tell whether a delta is added to a weight when it is used, instead of being patched in."""
    # 0.33 loads small layers of dynamic models whole and leaves their functions out.
    left_out = is_dynamic(patcher) and weight.nbytes <= SMALL_LAYER
    # ComfyUI-GGUF itself patches when it uses a weight, and has no place for functions.
    return is_quantised(weight) and not left_out and not is_ggml(weight)


def _refuse_other_shapes(patcher, delta: SparseDelta, weights: BaseWeights) -> None:
    wrong = delta.mismatches({name: tuple(w.shape) for name, w in weights.stored.items()})
    if wrong:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        own = delta.metadata.get("modelspec.architecture", "").removesuffix("/sara")
        trained = f"was trained on a model of the kind {own}, and" if own else ""
        raise ValueError(
            f"load the checkpoint that this delta was trained on: it {trained} does not fit the "
            f"{architecture(patcher)} model it is applied to. {'; '.join(wrong[:10])}{more}"
        )


def zero_small_weights(patcher, names: list[str], threshold: float):
    """Return a MODEL whose weights below the threshold are zero in the named parameters."""
    patched = patcher.clone()
    patched.add_patches({PREFIX + name: ZeroSmallWeights(set(), [threshold]) for name in names})
    return patched


class DeltaHook(comfy.hooks.WeightHook):
    """A delta that ComfyUI applies where and when its conditioning is used."""

    delta: SparseDelta | None = None

    def add_hook_patches(self, model, model_options, target_dict, registered):
        """Register the patches; refuses a model the delta does not fit."""
        if target_dict.get("target") == comfy.hooks.EnumWeightTarget.Model:
            _refuse_other_shapes(model, self.delta, base_weights(model))
        return super().add_hook_patches(model, model_options, target_dict, registered)

    def clone(self):
        """Copy it, as ComfyUI does before it changes a hook's strength."""
        copy = super().clone()
        copy.delta = self.delta
        return copy


def create_hook(delta: SparseDelta, strength: float, previous):
    """Return a group of hooks: the previous ones, if any, and one for the delta."""
    hook = DeltaHook(strength_model=strength, strength_clip=0.0)
    hook.delta, hook.need_weight_init, hook.weights_clip = delta, False, {}
    hook.weights = {
        PREFIX + name: SparseAdapter(set(), [entry.index, entry.values])
        for name, entry in delta.entries.items()
    }
    group = comfy.hooks.HookGroup() if previous is None else previous.clone()
    group.add(hook)
    return group
