"""ComfyUI as the pack sees it: models, weights, patches, folders, progress.

The only folder that touches ComfyUI's internals. Written against 0.3.75; what later versions do
otherwise is marked with the version.
"""

from .encoders import (
    clip_facts,
    compression,
    encode_pixels,
    encode_text,
    frames_taken,
    vae_facts,
)
from .execution import (
    Cancelled,
    Progress,
    add_route,
    check_cancelled,
    free_memory,
    memory_in_use,
    send_event,
    workflow_id,
)
from .families import is_guidance_distilled, trained_side
from .files import (
    FOLDER,
    INPUT,
    LORA_ENDING,
    cache_folder,
    delta_names,
    delta_path,
    foreign_checkpoint_names,
    foreign_checkpoint_path,
    is_delta_name,
    new_output_path,
    output_root,
    picture_folder,
    picture_folders,
    register_folders,
    video_folder,
    video_folders,
)
from .model_calls import ModelCalls
from .patches import (
    SparseAdapter,
    ZeroSmallWeights,
    apply_delta,
    create_hook,
    patches_carried,
    zero_small_weights,
)
from .processes import is_restarted, job, processes
from .sampling import SAMPLERS, SCHEDULERS, Sampling, sample, sample_in_training
from .schedules import foreign_prediction, noise_schedule, sampling_summary
from .training import needs_loss_scaling, trainable
from .weights import (
    architecture,
    base_weights,
    bytes_per_trained_weight,
    diffusers_names,
    is_quantised,
    patched_weights,
    trainable_weights,
    zero_rule,
)

__all__ = [
    "INPUT",
    "FOLDER",
    "LORA_ENDING",
    "Cancelled",
    "SAMPLERS",
    "SCHEDULERS",
    "Sampling",
    "sample",
    "sample_in_training",
    "ModelCalls",
    "Progress",
    "SparseAdapter",
    "ZeroSmallWeights",
    "add_route",
    "apply_delta",
    "architecture",
    "base_weights",
    "bytes_per_trained_weight",
    "cache_folder",
    "check_cancelled",
    "clip_facts",
    "compression",
    "create_hook",
    "delta_names",
    "delta_path",
    "diffusers_names",
    "encode_pixels",
    "encode_text",
    "frames_taken",
    "foreign_checkpoint_names",
    "foreign_checkpoint_path",
    "foreign_prediction",
    "is_delta_name",
    "free_memory",
    "is_guidance_distilled",
    "is_quantised",
    "is_restarted",
    "job",
    "memory_in_use",
    "needs_loss_scaling",
    "new_output_path",
    "noise_schedule",
    "output_root",
    "patched_weights",
    "processes",
    "patches_carried",
    "picture_folder",
    "picture_folders",
    "register_folders",
    "sampling_summary",
    "send_event",
    "trainable",
    "trainable_weights",
    "trained_side",
    "vae_facts",
    "video_folder",
    "video_folders",
    "workflow_id",
    "zero_rule",
    "zero_small_weights",
]
