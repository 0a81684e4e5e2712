"""torch.compile of a MODEL, as TorchCompileModel asks for it, while it trains."""

import inspect
import logging

from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import (
    COMPILE_KEY,
    TORCH_COMPILE_KWARGS,
    set_torch_compile_wrapper,
)

from ...sara_core.weights.quantised import Quantised

logger = logging.getLogger("comfyui-sara")


def compile_wrappers(patcher, is_reloaded: bool) -> dict:
    """Return what has a MODEL's calls go through the compiled model, as `transformer_options` hold it.

    Only that is taken over: what other nodes wrap around a model, such as caches that skip steps, is for
    sampling.

    Args:
        patcher: The MODEL, ready to be trained; changed if it has to be compiled once more.
        is_reloaded: Its weights are others than those that were compiled.
    """
    wrappers = patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY)
    if not wrappers:
        return {}
    if any(isinstance(p, Quantised) for p in patcher.model.diffusion_model.parameters()):
        logger.warning(
            "SaRA Train: the model is not compiled, as its weights become numbers only when they are used"
        )
        return {}
    if is_reloaded:
        compiled = inspect.getclosurevars(wrappers[0]).nonlocals.get("compiled_module_dict", {})
        options = patcher.model_options[TORCH_COMPILE_KWARGS]
        set_torch_compile_wrapper(patcher, **options, keys=list(compiled))
        wrappers = patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY)
    return {WrappersMP.APPLY_MODEL: {COMPILE_KEY: list(wrappers)}}
