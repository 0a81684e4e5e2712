"""Weights of a MODEL: which there are, what 8-bit ones stand for, which may train."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...sara_core.weights.quantised import Quantised

# Moved in 0.33.
string_to_seed = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed
PREFIX = "diffusion_model."
REAL_SCALE = "sara_scale"  # of a scaled layer whose weight acts as numbers for a while
CASTS = "comfy_cast_weights"  # layers that turn their weight into another dtype when it is used


class BaseWeights(Mapping):
    """Weights by parameter name; quantised ones are turned into numbers when they are asked for.

    Attributes:
        stored: The weights as the model holds them.
    """

    def __init__(
        self,
        stored: dict[str, Tensor],
        convert: dict[str, Callable],
        patch: dict[str, Callable] | None = None,
    ):
        self.stored = stored
        self._convert = convert
        self._patch = patch or {}

    def __getitem__(self, name: str) -> Tensor:
        weight = self.stored[name]
        with torch.no_grad():
            number = self._convert[name](weight, inplace=False) if is_quantised(weight) else weight
            return self._patch[name](number) if name in self._patch else number

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def kinds(self) -> dict[str, Tensor]:
        """Tensors without data to choose among by: of the weights' shapes, and floating-point as they are."""
        return {
            name: torch.empty(tuple(weight.shape), device="meta")
            for name, weight in self.stored.items()
            if weight.is_floating_point() or is_quantised(weight)
        }

    def only(self, names: Iterable[str]) -> "BaseWeights":
        """Return those of the names."""
        return BaseWeights({name: self.stored[name] for name in names}, self._convert, self._patch)

    def patched(self, patch: dict[str, Callable]) -> "BaseWeights":
        """Return them with what some of them become."""
        return BaseWeights(self.stored, self._convert, patch)


def base_weights(patcher) -> BaseWeights:
    """Return the unpatched weights of a MODEL's diffusion model.

    By hand, as `get_key_patches` fails on quantised layers in 0.33.
    """
    model, stored, convert = patcher.model.diffusion_model, {}, {}
    with patcher.use_ejected():
        for name, parameter in model.named_parameters():
            owner, _, kind = name.rpartition(".")
            backup = patcher.backup.get(PREFIX + name)
            hooked = patcher.hook_backup.get(PREFIX + name)
            if hooked is not None:
                stored[name] = hooked[0]
            else:
                stored[name] = parameter if backup is None else backup.weight
            if isinstance(stored[name], Quantised):  # while it trains
                stored[name] = stored[name].source.stored
            convert[name] = converter(model.get_submodule(owner), kind, stored[name])
    return BaseWeights(stored, convert)


def patched_weights(patcher) -> BaseWeights:
    """Return the weights of a MODEL as it uses them: with the LoRAs, merges and deltas it carries."""

    def patch(key: str, weight: Tensor) -> Tensor:
        few_bits = is_quantised(weight)
        dtype = torch.float32 if few_bits else patch_dtype(patcher.load_device)
        number = weight.to(dtype, copy=True)
        out = comfy.lora.calculate_weight(patcher.patches[key], number, key)
        if few_bits:  # added when it is used, so not rounded
            return out
        return comfy.float.stochastic_rounding(out, weight.dtype, seed=string_to_seed(key))

    weights = base_weights(patcher)
    keys = {name: PREFIX + name for name in weights if PREFIX + name in patcher.patches}
    return weights.patched({name: functools.partial(patch, key) for name, key in keys.items()})


def patch_dtype(device: torch.device) -> torch.dtype:
    """Return in what ComfyUI adds patches to weights on a device: since 0.33 half precision on graphics cards."""
    told = getattr(comfy.model_management, "lora_compute_dtype", None)
    return torch.float32 if told is None else told(device)


def rounds_patches(patcher) -> bool:
    """Tell whether a MODEL that is loaded whole has patches rounded into weights of eight bits."""
    stored = base_weights(patcher).stored
    patched = [w for name, w in stored.items() if PREFIX + name in patcher.patches]
    return any(is_quantised(weight) and not is_ggml(weight) for weight in patched)


def converter(module: torch.nn.Module, kind: str, stored: Tensor) -> Callable[..., Tensor]:
    """Return what turns a layer's stored weight into numbers, during training as well."""
    if is_ggml(stored):
        return functools.partial(_dequantised, module)
    scale = scale_of(module, kind)
    if scale is not None:
        return lambda weight, **_: weight.float() * scale.to(weight.device)
    return getattr(module, f"convert_{kind}", _as_it_is)


def scale_of(module: torch.nn.Module, kind: str) -> Tensor | None:
    """Return what the stored numbers of a layer's weight are to be multiplied with, if there is such."""
    if kind != "weight":
        return None
    return getattr(module, REAL_SCALE, getattr(module, "scale_weight", None))


def _dequantised(
    module: torch.nn.Module, weight: Tensor, with_patches: bool = False, **_
) -> Tensor:
    """Return the numbers of a GGUF file's weight, which holds the patches it gets with them."""
    if weight.is_floating_point():
        return weight.as_subclass(Tensor)
    held, weight.patches = weight.patches, weight.patches if with_patches else []
    try:
        with torch._C.DisableTorchFunctionSubclass():  # or all that is made would be of its kind
            return module.get_weight(weight, torch.float32).as_subclass(Tensor)
    finally:
        weight.patches = held


def _as_it_is(weight: Tensor, **_) -> Tensor:
    return weight


def trainable_weights(patcher) -> BaseWeights:
    """Return those of `patched_weights` that may train: those ComfyUI is able to patch."""
    names = patchable_names(patcher.model.diffusion_model)
    weights = patched_weights(patcher)
    return weights.only(name for name in weights if name in names)


def zero_rule(patcher, zeros: str) -> str:
    """Return how exact zeros are to be treated: in an 8-bit model they are rounded small weights."""
    weights = base_weights(patcher).stored.values()
    rounded = sum(weight.numel() for weight in weights if is_quantised(weight))
    mostly = rounded > sum(weight.numel() for weight in weights) / 2
    return "train" if zeros == "auto" and mostly else zeros


def computes_in(patcher) -> torch.dtype:
    """Return the dtype that a MODEL computes in; of 8-bit ones that say nothing, float32."""
    model = patcher.model
    own = model.get_dtype()
    return model.manual_cast_dtype or (own if own.itemsize > 1 else torch.float32)


def device_of(patcher) -> torch.device:
    """Return the device that a MODEL computes on, as tensors there name it: cuda:0, not cuda."""
    return torch.empty(0, device=patcher.load_device).device


def bytes_per_trained_weight(patcher) -> int:
    """Return what training takes for each trained weight; docs/cost.md says what it is made of."""
    model = patcher.model
    is_half = model.get_dtype().itemsize == 2 and computes_in(patcher).itemsize == 2
    weights = model.diffusion_model.parameters()
    stays_stored = any(is_quantised(w) or isinstance(w, Quantised) for w in weights)
    return 19 if is_half and not stays_stored else 17


def is_quantised(weight: Tensor) -> bool:
    """Tell whether a weight is stored in 8 bits or packed."""
    is_float8 = weight.is_floating_point() and weight.element_size() == 1
    is_packed = is_ggml(weight) and not weight.is_floating_point()
    return is_float8 or is_packed or isinstance(weight, QuantizedTensor)


def is_ggml(weight: Tensor | None) -> bool:
    """Tell whether a weight is of the kind in which ComfyUI-GGUF holds those of its files."""
    return hasattr(weight, "tensor_type") and hasattr(weight, "tensor_shape")


def is_widened(module: torch.nn.Module, weight: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether a layer turns its weight into numbers of a wider dtype when it computes in `dtype`."""
    if is_quantised(weight) or is_ggml(weight):
        return True
    casts = getattr(module, CASTS, False) and weight.is_floating_point()
    return casts and weight.dtype.itemsize < dtype.itemsize


def patchable_names(model: torch.nn.Module) -> set[str]:
    """Name the parameters ComfyUI patches: not those beside which a module has further modules.

    It skips parameters such as Wan's `blocks.0.modulation`, without a word, so what they learned would be
    gone once loaded. Layers that cannot cast their weight are patched by some versions only.
    """
    names = set()
    for path, module in model.named_modules():
        own = {name for name, _ in module.named_parameters(recurse=False)}
        is_leaf = own == {name for name, _ in module.named_parameters()}
        if is_leaf and hasattr(module, CASTS):
            names |= {f"{path}.{name}" if path else name for name in own & {"weight", "bias"}}
    return names


def architecture(patcher) -> str:
    """Name the model family, as ComfyUI detected it."""
    return type(patcher.model.model_config).__name__


def diffusers_names(patcher) -> dict[str, str]:
    """Map the names diffusers gives the parameters of an SD1.x or SD2.x model to ComfyUI's.

    Raises:
        ValueError: Another kind of model.
    """
    config = patcher.model.model_config
    if not isinstance(config, (comfy.supported_models.SD15, comfy.supported_models.SD20)):
        raise ValueError(
            f"this is a model of the kind {architecture(patcher)}; expected SD1.x or SD2.x"
        )
    own = {name for name, _ in patcher.model.diffusion_model.named_parameters()}
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    return {theirs: ours for theirs, ours in names.items() if ours in own}


def is_dynamic(patcher) -> bool:
    """Tell whether a MODEL's weights are streamed to the device piece by piece."""
    return getattr(patcher, "is_dynamic", bool)()  # since 0.33
