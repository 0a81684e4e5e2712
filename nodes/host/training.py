"""A MODEL loaded so that it can be trained."""

import contextlib
import functools
import logging
import types
from collections.abc import Callable, Iterator

import comfy.lora
import comfy.model_management
import comfy.ops
import torch
from comfy.model_patcher import LowVramPatch

from ...sara_core.training.inference_tensors import make_trackable
from ...sara_core.weights.quantised import Quantised, numbers_on_use
from .attention import differentiable_attention
from .compiled import compile_wrappers
from .model_calls import ModelCalls
from .operations import differentiable_operations, full_accumulation
from .weights import (
    PREFIX,
    REAL_SCALE,
    computes_in,
    converter,
    device_of,
    is_dynamic,
    is_ggml,
    is_quantised,
    is_widened,
    patch_dtype,
    patchable_names,
    scale_of,
)

FUNCTIONS = ("weight_function", "bias_function")  # of a layer, on its weights when they are used

logger = logging.getLogger("comfyui-sara")


@contextlib.contextmanager
def trainable(
    patcher, dtype: torch.dtype | None, offloading: bool = False, trained_in: str = "device"
) -> Iterator["ModelCalls"]:
    """Load a MODEL so that gradients can be taken through it, and yield the way to call it.

    ComfyUI loads weights in inference mode, where autograd cannot save them; each is replaced by
    an equal ordinary tensor, one at a time. Weights that are computed with in a wider dtype, as 8-bit ones
    are, stay, and numbers are made of them when they are used. Afterwards requires_grad and the train
    mode are as before; putting weights back is the trainer's part.

    Args:
        patcher: The MODEL, with the patches it is to be trained with.
        dtype: To compute in; None leaves the model's own.
        offloading: Leave the weights in main memory; they are copied to the device when they are used.
        trained_in: Where trained values and what the optimizer keeps of them are, one of `TRAINED_IN`.
    """
    is_reloaded = is_dynamic(patcher)
    patcher = _ordinary_clone(patcher)
    if dtype is not None:
        patcher.set_model_compute_dtype(dtype)
    # Moved outside of inference mode, weights would look ordinary and not be.
    with torch.inference_mode(), _little_on_device():
        comfy.model_management.load_models_gpu(
            [patcher], memory_required=1e20, force_full_load=not offloading
        )
    model = patcher.model.diffusion_model
    had_flag = getattr(comfy.model_management, "in_training", None)
    learned_on = torch.device("cpu") if trained_in == "main memory" else None
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        differentiable_attention(),
        differentiable_operations(),
        full_accumulation(),
        _numbers_on_use(model, computes_in(patcher), device_of(patcher), learned_on),
    ):
        _unpin(patcher)
        make_trackable(model)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        try:
            patchable = patchable_names(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in patchable)
            patcher.pre_run()
            if had_flag is not None:  # since 0.33; some models branch on it
                comfy.model_management.in_training = True
            yield ModelCalls(patcher, compile_wrappers(patcher, is_reloaded))
        finally:
            if had_flag is not None:
                comfy.model_management.in_training = had_flag
            patcher.cleanup()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags[name])
                parameter.grad = None


@contextlib.contextmanager
def _little_on_device() -> Iterator[None]:
    """Have ComfyUI load none of a model beside what it must, where it is to be offloaded.

    It fills a share of the free memory of cards other than Nvidia's, of which the run knows nothing.
    """
    ratio = comfy.model_management.MIN_WEIGHT_MEMORY_RATIO
    comfy.model_management.MIN_WEIGHT_MEMORY_RATIO = 0.0
    try:
        yield
    finally:
        comfy.model_management.MIN_WEIGHT_MEMORY_RATIO = ratio


def _unpin(patcher) -> None:
    """Have ComfyUI let go of pinned memory of weights that are about to be replaced.

    It pins those that wait in main memory so that copies need not wait; those that act as numbers stay.
    """
    for name, parameter in patcher.model.diffusion_model.named_parameters():
        if not isinstance(parameter, Quantised):
            patcher.unpin_weight(PREFIX + name)


@contextlib.contextmanager
def _numbers_on_use(
    model: torch.nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    learned_on: torch.device | None,
) -> Iterator[None]:
    """Have weights act as numbers for a while that are not what layers compute with, where they do.

    These are weights of a narrower dtype, those that wait in main memory, and all if what is trained of them
    is to be elsewhere.
    """
    converters, scales = _converters(model, dtype, device, learned_on is not None)
    changes = _changes(model, converters)
    with (
        numbers_on_use(model, converters, dtype, scales, device, learned_on, changes),
        contextlib.ExitStack() as stack,
    ):
        for module in model.modules():
            if any(isinstance(weight, Quantised) for weight in module._parameters.values()):
                stack.enter_context(_computing_with_numbers(module))
        yield


def _converters(
    model: torch.nn.Module, dtype: torch.dtype, device: torch.device, every: bool
) -> tuple[dict, dict]:
    """Return what makes numbers of weights that are not yet, and their scales, by parameter name."""
    converters: dict[str, Callable] = {}
    scales = {}
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            full_name = f"{path}.{name}" if path else name
            if not is_widened(module, weight, dtype):
                if weight.is_floating_point() and (every or weight.device != device):
                    converters[full_name] = torch.detach
                continue
            scale = scale_of(module, name)
            if scale is not None:
                converters[full_name], scales[full_name] = torch.detach, scale.detach()
                continue
            options = {"with_patches": True} if is_ggml(weight) else {"inplace": False}
            converters[full_name] = functools.partial(converter(module, name, weight), **options)
    return converters, scales


def _changes(model: torch.nn.Module, converters: dict) -> dict[str, list[Callable]]:
    """Return what layers add to their weights when they use them: LoRAs and deltas that the MODEL carries.

    Added by the layers themselves, autograd would keep the sums.
    """
    found = {}
    for name in converters:
        path, _, kind = name.rpartition(".")
        functions = getattr(model.get_submodule(path), f"{kind}_function", ())
        stored = model.get_parameter(name)
        kept = None if is_quantised(stored) or is_ggml(stored) else stored.dtype
        found[name] = [
            functools.partial(_patched, function, kept)
            if isinstance(function, LowVramPatch)
            else function
            for function in functions
        ]
    return found


def _patched(patch: LowVramPatch, kept: torch.dtype | None, weight: torch.Tensor) -> torch.Tensor:
    """Add a patch to numbers.

    Args:
        patch: What is added.
        kept: Dtype of the stored weight, which a model that is loaded whole rounds the sum to; None for few
            bits, to which it is not rounded here.
        weight: Numbers, which may change.
    """
    number = weight.to(torch.float32 if kept is None else patch_dtype(weight.device))
    out = comfy.lora.calculate_weight(patch.patches[patch.key], number, patch.key)
    return out.to(kept or weight.dtype).to(weight.dtype)


@contextlib.contextmanager
def _computing_with_numbers(module: torch.nn.Module) -> Iterator[None]:
    """Have a layer take its weights for the numbers that they are by now, with all that it adds to them."""
    held, parameters = vars(module).copy(), module._parameters.copy()
    try:
        if getattr(module, "scale_weight", None) is not None:
            forward = comfy.ops.manual_cast.Linear.forward_comfy_cast_weights
            module.forward_comfy_cast_weights = types.MethodType(forward, module)
            setattr(module, REAL_SCALE, module.scale_weight.detach())
            ones = torch.ones_like(module.scale_weight)
            module._parameters["scale_weight"] = torch.nn.Parameter(ones, requires_grad=False)
        if "_full_precision_mm" in held:
            module._full_precision_mm = True
        for function in FUNCTIONS:
            if isinstance(module._parameters.get(function.removesuffix("_function")), Quantised):
                setattr(module, function, [])
        yield
    finally:
        for name in ("forward_comfy_cast_weights", REAL_SCALE, "_full_precision_mm", *FUNCTIONS):
            if name in held:
                setattr(module, name, held[name])
            else:
                vars(module).pop(name, None)
        if "scale_weight" in parameters:
            module._parameters["scale_weight"] = parameters["scale_weight"]


def _ordinary_clone(patcher):
    """Clone a MODEL; one whose weights 0.33 streams to the GPU piece by piece is loaded whole.

    Raises:
        ValueError: It is streamed, and its loader has left no way to load it once more.
    """
    if is_dynamic(patcher):
        if patcher.cached_patcher_init is None:
            raise ValueError(
                "this model's weights are streamed to the graphics card piece by piece, which cannot "
                "be trained, and its loader does not say how to load it whole; load it with Load "
                "Checkpoint or Load Diffusion Model, or start ComfyUI with --disable-dynamic-vram"
            )
        logger.info("SaRA Train: loading the model once more, as dynamic weights cannot be trained")
        return patcher.clone(disable_dynamic=True)
    return patcher.clone()


def needs_loss_scaling(patcher, dtype: torch.dtype | None) -> bool:
    """Tell whether gradients will be float16, which loses small ones without loss scaling."""
    own, compute = patcher.model.get_dtype(), computes_in(patcher)
    is_widened_first = compute.itemsize > own.itemsize  # its gradients are float32's
    return torch.float16 in (dtype, compute, None if is_widened_first else own)
