"""The widgets of SaRA Train."""

import torch
from comfy_api.latest import io

from ...sara_core.optimizer.adam_moments import KINDS
from ...sara_core.optimizer.learning_rate import SCHEDULES
from ...sara_core.optimizer.sara_adamw import LOW_RANK_WEIGHT
from ...sara_core.training.objective import LOSSES
from .. import output_folder
from ..inputs import SAVE_DTYPES, filter_inputs, selection_inputs, strength_input

NEW_RUN = "new run"
FREE_TO_CHANGE = (
    "gradient_checkpointing",
    "offloading",
    "save_every_steps",
    "keep_checkpoints",
    "preview_every_steps",
    "preview_strength",
    "trigger_words",
)
COMPUTE_DTYPES = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def training_inputs() -> list:
    """Widgets of SaRA Train, in the order people think of them."""
    return [
        *selection_inputs(),
        io.Int.Input(
            "steps",
            default=500,
            min=1,
            max=1_000_000,
            tooltip="Updates to make. 300 to 1000 suit a style on 10 to 50 pictures; the paper "
            "makes 5000 on a few hundred.",
        ),
        io.Int.Input(
            "batch_size",
            default=4,
            min=1,
            max=1024,
            tooltip="Pictures per forward pass, each with its own caption and noise level. Lower it "
            "when memory runs out.",
        ),
        io.Int.Input(
            "grad_accumulation_steps",
            default=1,
            min=1,
            max=1024,
            tooltip="Forward passes per update: the effect of a larger batch without its memory.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.0000001,
            tooltip="Peak learning rate. 0 takes the paper's rule, 0.001 * exp(-350 * threshold).",
        ),
        io.Combo.Input(
            "lr_schedule",
            options=list(SCHEDULES),
            default="cosine",
            tooltip="Course of the learning rate over the steps.",
        ),
        io.Int.Input(
            "warmup_steps",
            default=0,
            min=0,
            max=100_000,
            tooltip="Steps over which the learning rate rises to its peak.",
        ),
        io.Float.Input(
            "progressive",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Point of the run, as a share of the steps, from which only weights that are "
            "still below the threshold train on. 0 turns it off.",
        ),
        io.Float.Input(
            "low_rank_weight",
            default=LOW_RANK_WEIGHT,
            min=0.0,
            max=1.0,
            step=0.00001,
            tooltip="Weight of the pull toward low rank, which keeps the change simple. 0 turns it "
            "off.",
        ),
        io.Float.Input(
            "max_grad_norm",
            default=1.0,
            min=0.0,
            max=1000.0,
            step=0.01,
            tooltip="Larger gradients are scaled down to this norm. 0 turns it off.",
        ),
        io.Combo.Input(
            "loss_function",
            options=list(LOSSES),
            default="mse",
            tooltip="How errors are measured, in the model's own prediction (epsilon, v, flow).",
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Share of captions replaced by the empty one, so that guidance goes on working. "
            "Has no effect while nothing is connected to empty.",
        ),
        io.Float.Input(
            "weight_decay",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Pulls what was learned back toward the base weights.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="The same seed and inputs give the same delta.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=False,
            tooltip="Computes parts twice to save memory: about a third slower, much less memory.",
        ),
        io.Combo.Input(
            "training_dtype",
            options=list(COMPUTE_DTYPES),
            default="auto",
            tooltip="Precision to compute in; auto is the model's own. What is learned is always "
            "kept in fp32 during training.",
        ),
        io.Combo.Input(
            "save_dtype",
            options=list(SAVE_DTYPES),
            default="fp16",
            tooltip="Precision of the saved values.",
        ),
        io.String.Input(
            "output_name",
            default="style",
            tooltip="Name of the run's folder in output/sara; a number is added, so nothing is "
            "overwritten.",
        ),
        io.Int.Input(
            "save_every_steps",
            default=100,
            min=0,
            max=1_000_000,
            tooltip="Steps between two saves of a checkpoint and of the state to resume from. With 0 it "
            "saves at the change of stage, and when the run ends, is cancelled or fails.",
        ),
        io.Int.Input(
            "keep_checkpoints",
            default=2,
            min=1,
            max=1000,
            tooltip="Number of checkpoints to keep; older ones are deleted.",
        ),
        io.Combo.Input(
            "resume",
            options=[NEW_RUN, *output_folder.resumable_runs()],
            default=NEW_RUN,
            tooltip="A cancelled or failed run to go on with, exactly where it stopped. Its own "
            "settings are used; of the widgets here only gradient_checkpointing, offloading, "
            "save_every_steps, keep_checkpoints, trigger_words, moments if it is 8bit, and those of "
            "previews count. Press R to refresh the list.",
        ),
        *filter_inputs(),
        io.Float.Input(
            "regularisation_weight",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.01,
            tooltip="Weight of the loss on the regularisation pictures, beside 1 for the others. Has "
            "no effect while none are connected.",
        ),
        io.Float.Input(
            "validation_split",
            default=0.0,
            min=0.0,
            max=0.9,
            step=0.01,
            tooltip="Share of the pictures that are held out. The loss on them, always at the same "
            "noise, tells when the model stops learning and starts memorising. 0 holds out none.",
        ),
        io.Int.Input(
            "validate_every_steps",
            default=50,
            min=1,
            max=1_000_000,
            tooltip="Steps between two measurements on the pictures held out.",
        ),
        io.Int.Input(
            "preview_every_steps",
            default=100,
            min=0,
            max=1_000_000,
            tooltip="Steps between two rows of previews; one is made before the first step and one "
            "after the last. 0 makes only the last. Has no effect while nothing is connected to "
            "preview.",
        ),
        strength_input(
            "preview_strength",
            1.0,
            "Strength of what was learned so far in the previews, as in Apply SaRA.",
        ),
        io.String.Input(
            "trigger_words",
            default="",
            tooltip="Words that call up what was learned, if the captions have such; kept in the "
            "file, where Load SaRA Delta shows them.",
        ),
        io.Boolean.Input(
            "offloading",
            default=False,
            optional=True,  # workflows in API form from before it was there
            tooltip="Leaves most of the model in main memory and copies each layer to the graphics card "
            "when it is used: for models that do not fit, and slower.",
        ),
        io.Combo.Input(
            "moments",
            options=list(KINDS),
            default="fp32",
            optional=True,
            tooltip="Precision of the optimizer's two moments. 8bit saves 6 of about 17 bytes per trained "
            "weight and follows fp32 closely; it needs the Python package torchao.",
        ),
    ]
