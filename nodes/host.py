"""ComfyUI as the pack sees it: models, weights, patches, folders, progress.

The only file that touches ComfyUI's internals. Written against 0.3.75.
"""

import contextlib
import functools
import gc
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import comfy.conds
import comfy.hooks
import comfy.model_management
import comfy.model_sampling as sampling
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.patcher_extension import CallbacksMP
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase
from comfyui_version import __version__
from server import PromptServer
from torch import Tensor

from ..sara_core import SparseDelta
from ..sara_core.encoding_cache import weights_digest
from ..sara_core.objective import NoiseSchedule
from ..sara_core.tracking import make_trackable, trackable_copy

logger = logging.getLogger("comfyui-sara")

FOLDER = "sara"
DATASETS = "datasets"
PREFIX = "diffusion_model."
REAL_SCALE = "sara_scale"  # of a scaled layer whose weight is a number for a while
SMALL_LAYER = 16 * 1024  # bytes
CASTS = "comfy_cast_weights"  # layers that turn their weight into another dtype when it is used


def register_folders() -> None:
    """Make models/sara and output/sara known, beside paths of extra_model_paths.yaml."""
    for root in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(FOLDER, os.path.join(root, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    # A folder type without extensions lists every file.
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | {".safetensors"})


def delta_names() -> list[str]:
    """List the delta files in the registered folders."""
    return folder_paths.get_filename_list(FOLDER)


def delta_path(name: str) -> str:
    """Return the full path of a listed delta file.

    Raises:
        ValueError: No such file in the registered folders.
    """
    if name not in folder_paths.get_filename_list(FOLDER):
        raise ValueError(
            f"there is no delta {name!r} in {', '.join(folder_paths.get_folder_paths(FOLDER))}; "
            "press R to refresh the list"
        )
    return folder_paths.get_full_path_or_raise(FOLDER, name)


def foreign_checkpoint_names() -> list[str]:
    """List the .pt files in the folders of deltas."""
    found = set()
    for root in folder_paths.get_folder_paths(FOLDER):
        found |= {path.relative_to(root).as_posix() for path in Path(root).rglob("*.pt")}
    return sorted(found)


def foreign_checkpoint_path(name: str) -> str:
    """Return the path of a file that `foreign_checkpoint_names` lists.

    Raises:
        ValueError: Another name.
    """
    if name not in foreign_checkpoint_names():
        raise ValueError(
            f"there is no {name!r} in {', '.join(folder_paths.get_folder_paths(FOLDER))}; put the "
            "file there and press R to refresh the list"
        )
    return folder_paths.get_full_path_or_raise(FOLDER, name)


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


def output_root() -> str:
    """Return the folder output/sara, in which runs and deltas are kept."""
    return os.path.abspath(os.path.join(folder_paths.get_output_directory(), FOLDER))


def new_output_path(prefix: str) -> str:
    """Return a path that does not exist yet, below the output folder, with a counter in its name."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    return os.path.join(folder, f"{name}_{counter:05}_.safetensors")


def picture_folders() -> dict[str, str]:
    """List the folders below input/ and datasets/ by name, such as `input/cats`, with their paths.

    Links that lead out of these roots are left out, and so are hidden folders.
    """
    roots = [("input", folder_paths.get_input_directory())]
    if DATASETS in folder_paths.folder_names_and_paths:  # since 0.33
        roots += [(DATASETS, path) for path in folder_paths.get_folder_paths(DATASETS)]
    found: dict[str, str] = {}
    for label, root in roots:
        real = os.path.realpath(root)
        for parent, folders, _ in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in folders:
                path = os.path.join(parent, name)
                if Path(os.path.realpath(path)).is_relative_to(real):
                    relative = os.path.relpath(path, root).replace(os.sep, "/")
                    found.setdefault(f"{label}/{relative}", path)
    return found


def picture_folder(name: str) -> str:
    """Return the path of a folder that `picture_folders` lists.

    Raises:
        ValueError: Another name.
    """
    folders = picture_folders()
    if name not in folders:
        raise ValueError(
            f"there is no picture folder {name!r}; put one into ComfyUI's input folder and press R "
            "to refresh the list"
        )
    return folders[name]


def cache_folder() -> str:
    """Return the folder in which encoded pictures and captions are kept."""
    return os.path.join(folder_paths.get_user_directory(), "sara_cache")


def compression(vae) -> int:
    """Return how many pixels of a side go into one latent value."""
    ratio = vae.spacial_compression_encode()
    return int(ratio[-1] if isinstance(ratio, (tuple, list)) else ratio)


def vae_facts(vae) -> list | None:
    """Say what an encoding by this VAE depends on; None if that cannot be told."""
    model = vae.first_stage_model
    if vae.patcher.patches:
        return None
    comfy.model_management.load_models_gpu([vae.patcher])
    return [
        __version__,
        type(model).__name__,
        str(vae.vae_dtype),
        weights_digest(model.state_dict()),
    ]


def clip_facts(clip) -> list | None:
    """Say what an encoding by this CLIP depends on; None if it carries patches or hooks."""
    if clip.patcher.patches or clip.patcher.forced_hooks is not None:
        return None
    clip.load_model()  # puts back what a patched clone may have left in the weights
    model, tokenizer = clip.cond_stage_model, clip.tokenizer
    options = sorted((str(k), str(v)) for k, v in clip.tokenizer_options.items())
    names = [__version__, type(model).__name__, type(tokenizer).__name__]
    return [*names, str(clip.layer_idx), options, weights_digest(model.state_dict())]


def encode_pixels(vae, pixels: Tensor) -> Tensor:
    """Encode one picture, `(1, H, W, 3)` in `[0, 1]`. Returns its latent, batch first.

    One at a time, as video VAEs take a batch for frames.
    """
    return vae.encode(pixels)


def encode_text(clip, text: str) -> list:
    """Encode a caption. Returns a CONDITIONING."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


class BaseWeights(Mapping):
    """Weights by parameter name; quantised ones are turned into numbers when they are asked for.

    Attributes:
        stored: The weights as the model holds them.
    """

    def __init__(self, stored: dict[str, Tensor], convert: dict[str, Callable]):
        self.stored = stored
        self._convert = convert

    def __getitem__(self, name: str) -> Tensor:
        weight = self.stored[name]
        if not _is_quantised(weight):
            return weight
        with torch.no_grad():
            return self._convert[name](weight, inplace=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def only(self, names: Iterable[str]) -> "BaseWeights":
        """Return those of the names."""
        return BaseWeights({name: self.stored[name] for name in names}, self._convert)


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
            module = model.get_submodule(owner)
            convert[name] = _converter(module, kind)
    return BaseWeights(stored, convert)


def _converter(module: torch.nn.Module, kind: str) -> Callable[..., Tensor]:
    """Return what turns a layer's stored weight into numbers, during training as well."""
    scale = getattr(module, REAL_SCALE, getattr(module, "scale_weight", None))
    if kind == "weight" and scale is not None:
        return lambda weight, **_: weight.float() * scale.to(weight.device)
    return getattr(module, f"convert_{kind}", _as_it_is)


def _as_it_is(weight: Tensor, **_) -> Tensor:
    return weight


def trainable_weights(patcher) -> BaseWeights:
    """Return those of `base_weights` that may train: those ComfyUI is able to patch."""
    names = _patchable_names(patcher.model.diffusion_model)
    weights = base_weights(patcher)
    return weights.only(name for name in weights if name in names)


def zero_rule(patcher, zeros: str) -> str:
    """Return how exact zeros are to be treated: in an 8-bit model they are rounded small weights."""
    weights = base_weights(patcher).stored.values()
    rounded = sum(weight.numel() for weight in weights if _is_quantised(weight))
    mostly = rounded > sum(weight.numel() for weight in weights) / 2
    return "train" if zeros == "auto" and mostly else zeros


def bytes_per_trained_weight(patcher) -> int:
    """Return what training takes for each trained weight; docs/cost.md says what it is made of."""
    model = patcher.model
    dtype = model.get_dtype()
    if dtype.itemsize == 1:  # trained as numbers of the dtype it computes in
        dtype = model.manual_cast_dtype or torch.float32
    return 17 if dtype == torch.float32 else 19


def _is_quantised(weight: Tensor) -> bool:
    is_float8 = weight.is_floating_point() and weight.element_size() == 1
    return is_float8 or isinstance(weight, QuantizedTensor)


def _patchable_names(model: torch.nn.Module) -> set[str]:
    """Name the parameters ComfyUI patches: not those beside which a module has further modules.

    It passes over such as Wan's `blocks.0.modulation`, without a word, so what they learned would be
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
        index, change = index.long(), values.float() * strength
        old = torch.take(weight, index)
        return weight.put_(index, (old.float() + change).to(weight.dtype))


class SparseAddition:
    """Adds a delta's entry to an 8-bit weight whenever it is used, after it was turned into numbers.

    Patched in, small changes would be lost: float8's steps near zero are as large as they are.

    Args:
        index: Flat positions, `(k,)`.
        values: What is added at strength 1, `(k,)`.
        strength: Factor.
        module: The layer; where it has a `scale_weight`, the weight comes divided by it.
    """

    def __init__(self, index: Tensor, values: Tensor, strength: float, module: torch.nn.Module):
        self.index, self.values, self.strength = index, values, strength
        self._module = weakref.ref(module)
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def move_to(self, device) -> int:
        """Have a copy where the weight is; returns the bytes it takes there."""
        self.forget()
        return sum(tensor.nbytes for tensor in self._on(torch.device(device)))

    def forget(self) -> None:
        """Let go of the copies on devices; they are made anew when needed."""
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
    if not delta.fits_base(weights):
        logger.warning(
            "Apply SaRA: this delta was trained on another base than the loaded checkpoint. Shapes "
            "fit, so it is applied, but the result may differ from what was trained"
        )
    patchable = _patchable_names(patcher.model.diffusion_model)
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


def _is_added_when_used(patcher, weight: Tensor) -> bool:
    """Tell whether a delta is added to a weight when it is used, instead of being patched in."""
    # 0.33 loads small layers of dynamic models whole and leaves their functions out.
    left_out = _is_dynamic(patcher) and weight.nbytes <= SMALL_LAYER
    return _is_quantised(weight) and not left_out


def _refuse_other_shapes(patcher, delta: SparseDelta, weights: BaseWeights) -> None:
    wrong = delta.mismatches({name: tuple(w.shape) for name, w in weights.stored.items()})
    if wrong:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            f"this delta does not fit the {architecture(patcher)} model it is applied to: "
            f"{'; '.join(wrong[:10])}{more}. Load the checkpoint it was trained on"
        )


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


def zero_small_weights(patcher, names: list[str], threshold: float):
    """Return a MODEL whose weights below the threshold are zero in the named parameters."""
    patched = patcher.clone()
    patched.add_patches({PREFIX + name: ZeroSmallWeights(set(), [threshold]) for name in names})
    return patched


def noise_schedule(patcher) -> NoiseSchedule:
    """Describe how a MODEL is noised, with the sampling patches it carries (shift, v-prediction).

    Raises:
        ValueError: A kind of prediction that cannot be trained.
    """
    model_sampling = patcher.get_model_object("model_sampling")
    kinds = (  # subclasses before their bases
        (sampling.IMG_TO_IMG, None),
        (getattr(sampling, "IMG_TO_IMG_FLOW", sampling.IMG_TO_IMG), None),  # since 0.33
        (sampling.X0, "x0"),
        (sampling.EDM, "edm"),
        (sampling.V_PREDICTION, "v"),
        (sampling.COSMOS_RFLOW, "cosmos_flow"),
        (sampling.CONST, "flow"),
        (sampling.EPS, "epsilon"),
    )
    prediction = next((kind for cls, kind in kinds if isinstance(model_sampling, cls)), None)
    if prediction is None:
        names = [cls.__name__ for cls in type(model_sampling).__mro__[1:4]]
        raise ValueError(f"a model with the sampling {'/'.join(names)} cannot be trained with SaRA")
    if prediction == "cosmos_flow":
        sigma_max = float(model_sampling.sigma_max)
        return NoiseSchedule(
            prediction, "logit_normal", lambda t: (t / (1 - t)).clamp(max=sigma_max)
        )
    if prediction == "flow":
        scale = getattr(model_sampling, "multiplier", 1.0)
        smallest = float(model_sampling.sigma_min)
        return NoiseSchedule(
            prediction,
            "logit_normal",
            lambda t: model_sampling.sigma(t.clamp(min=1e-6) * scale).clamp(min=smallest),
        )
    continuous = isinstance(model_sampling, sampling.ModelSamplingContinuousEDM)
    table = model_sampling.sigmas.float().cpu().clone()
    return NoiseSchedule(
        prediction,
        "log_normal" if continuous and prediction == "edm" else "uniform",
        lambda t: table[(t * len(table)).long().clamp(max=len(table) - 1)],
        float(getattr(model_sampling, "sigma_data", 1.0)),
    )


def sampling_summary(patcher) -> list:
    """Summarise a MODEL's noise schedule, to notice another one: prediction, sigma half way."""
    schedule = noise_schedule(patcher)
    return [schedule.prediction, schedule.to_sigma(torch.tensor([0.5])).item()]


@contextlib.contextmanager
def trainable(patcher, dtype: torch.dtype | None) -> Iterator["ModelCalls"]:
    """Load a MODEL so that gradients can be taken through it, and yield the way to call it.

    ComfyUI loads weights in inference mode, where autograd cannot save them; each is replaced by
    an equal ordinary tensor, one at a time. Afterwards requires_grad and the train mode are as
    before; putting weights back is the trainer's part.

    Args:
        patcher: The MODEL, with the patches it is to be trained with.
        dtype: To compute in; None leaves the model's own.
    """
    patcher = _ordinary_clone(patcher)
    if dtype is not None:
        patcher.set_model_compute_dtype(dtype)
    with torch.inference_mode():  # moved outside it, weights would look ordinary and not be
        comfy.model_management.load_models_gpu(
            [patcher], memory_required=1e20, force_full_load=True
        )
    model = patcher.model.diffusion_model
    had_flag = getattr(comfy.model_management, "in_training", None)
    compute_dtype = patcher.model.manual_cast_dtype or torch.float32
    with torch.inference_mode(False), torch.enable_grad(), _dequantised(model, compute_dtype):
        make_trackable(model)
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        try:
            patchable = _patchable_names(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in patchable)
            patcher.pre_run()
            if had_flag is not None:  # since 0.33; some models branch on it
                comfy.model_management.in_training = True
            yield ModelCalls(patcher)
        finally:
            if had_flag is not None:
                comfy.model_management.in_training = had_flag
            patcher.cleanup()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags[name])
                parameter.grad = None


def _is_dynamic(patcher) -> bool:
    return getattr(patcher, "is_dynamic", bool)()  # since 0.33


@contextlib.contextmanager
def _dequantised(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Have numbers in place of 8-bit weights for a while; the very same weights are put back."""
    replaced, marked = [], []

    def replace(module, name, value):
        holder = module._parameters if name in module._parameters else vars(module)
        replaced.append((holder, name, holder[name]))
        holder[name] = value

    try:
        for module in model.modules():
            for name, weight in list(module._parameters.items()):
                if weight is None or not _is_quantised(weight):
                    continue
                with torch.no_grad():
                    number = _converter(module, name)(weight, inplace=False).to(dtype)
                replace(module, name, torch.nn.Parameter(number, requires_grad=False))
                if name == "weight" and getattr(module, "scale_weight", None) is not None:
                    ones = torch.ones_like(module.scale_weight)
                    setattr(module, REAL_SCALE, module.scale_weight.detach())
                    marked.append(module)
                    replace(module, "scale_weight", torch.nn.Parameter(ones, requires_grad=False))
                if "_full_precision_mm" in vars(module):
                    replace(module, "_full_precision_mm", True)
        yield
    finally:
        for holder, name, value in replaced:
            holder[name] = value
        for module in marked:
            delattr(module, REAL_SCALE)


def _ordinary_clone(patcher):
    """Clone a MODEL; one whose weights 0.33 streams to the GPU piece by piece is loaded whole."""
    if _is_dynamic(patcher):
        logger.info("SaRA Train: loading the model once more, as dynamic weights cannot be trained")
        return patcher.clone(disable_dynamic=True)
    return patcher.clone()


def needs_loss_scaling(patcher, dtype: torch.dtype | None) -> bool:
    """Tell whether gradients will be float16, which loses small ones without loss scaling."""
    model = patcher.model
    return torch.float16 in (dtype, model.get_dtype(), model.manual_cast_dtype)


def free_memory() -> None:
    """Give back what PyTorch and Python hold but do not need."""
    gc.collect()
    comfy.model_management.soft_empty_cache()


def check_cancelled() -> None:
    """Raise ComfyUI's interrupt if the user has pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def send_event(name: str, data: dict) -> None:
    """Send a message to every browser that is connected; without one it goes nowhere."""
    PromptServer.instance.send_sync(name, data)


def memory_in_use() -> tuple[int, int]:
    """Return bytes in use and bytes there are on the device that models run on."""
    device = comfy.model_management.get_torch_device()
    try:
        total = comfy.model_management.get_total_memory(device)
        return total - comfy.model_management.get_free_memory(device), total
    except RuntimeError as error:  # of a device in trouble; only shown, never needed
        logger.warning("the memory in use cannot be told: %s", error)
        return 0, 0


class Progress:
    """The node's progress bar and the text below it. Cancel surfaces as an exception here."""

    def __init__(self, total: int, node_id: str | None):
        self.bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self.node_id = node_id

    def update(self, done: int) -> None:
        """Show how far it is.

        Raises:
            comfy.model_management.InterruptProcessingException: The user pressed Cancel.
        """
        self.bar.update_absolute(done)
        check_cancelled()

    def text(self, text: str) -> None:
        """Show a line of text on the node."""
        if self.node_id is not None:
            PromptServer.instance.send_progress_text(text, self.node_id)


class ModelCalls:
    """Calls a MODEL with one caption per sample, in the model's own conditioning format.

    ComfyUI's guiders apply every caption to the whole batch; training needs picture, caption and
    noise level to stay together.
    """

    def __init__(self, patcher):
        self.patcher = patcher
        self.model = patcher.model
        self.device = patcher.load_device
        self.schedule = noise_schedule(patcher)

    def prepare_latent(self, latent: Tensor) -> Tensor:
        """Scale a latent `(1, C, ...)` as the model expects it, float32, on the CPU.

        Raises:
            ValueError: Other channels than the model's.
        """
        channels = self.model.latent_format.latent_channels
        if latent.shape[1] != channels:
            raise ValueError(
                f"a latent has {latent.shape[1]} channels but this {architecture(self.patcher)} "
                f"model takes {channels}; encode the pictures with the VAE of the same checkpoint"
            )
        return self.model.process_latent_in(latent.clone().float().cpu())

    def encode_captions(self, captions: list[list], latents: list[Tensor]) -> list[dict]:
        """Turn conditioning pairs into the model's keyword arguments, for one sample each.

        Raises:
            ValueError: A conditioning that carries a ControlNet or a mask.
        """
        encoded = []
        copies: dict[tuple, list] = {}  # repeats and windows of a picture share their caption
        for (cross_attention, options), latent in zip(captions, latents, strict=True):
            unusable = {"control", "mask", "area", "hooks", "gligen"} & options.keys()
            if unusable:
                raise ValueError(
                    f"a caption's conditioning carries {', '.join(sorted(unusable))}, which SaRA "
                    "Train cannot use; connect it straight from CLIP Text Encode"
                )
            which = id(cross_attention), id(options)
            if which not in copies:
                copies[which] = [trackable_copy(cross_attention), trackable_copy(options)]
            pair = copies[which]
            conds = comfy.sampler_helpers.convert_cond([pair])
            conds = comfy.samplers.encode_model_conds(
                self.model.extra_conds, conds, latent, torch.device("cpu"), "positive",
                latent_image=latent, denoise_mask=None, seed=None,
            )  # fmt: skip
            encoded.append(
                {
                    name: cond.process_cond(batch_size=1, area=None)
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
        order, outputs = [], []
        for members in groups.values():
            conds = comfy.samplers.cond_cat([captions[i] for i in members])
            options = dict(self.patcher.model_options["transformer_options"])
            options.update(cond_or_uncond=[0], sigmas=sigma[members])
            outputs.append(
                self.model.apply_model(
                    noisy[members], sigma[members], **conds, transformer_options=options
                )
            )
            order += members
        back = torch.argsort(torch.tensor(order)).to(noisy.device)
        return torch.cat(outputs)[back]


def _signature(caption: dict) -> str:
    """Describe the shapes of a caption's conditioning; equal ones can share a pass."""
    parts = []
    for name, cond in sorted(caption.items()):
        is_constant = isinstance(cond, comfy.conds.CONDConstant)
        parts.append(f"{name}:{cond.cond if is_constant else cond.size()}")
    return "|".join(parts)
