"""The widgets of SaRA Train, in the order people think of them: the few that matter, then the rest."""

from comfy_api.latest import io

from ...sara_core.optimizer.learning_rate import SCHEDULES
from .. import output_folder
from ..inputs import advanced, filter_inputs, fraction_input, threshold_input
from .folded_widgets import (
    SETTINGS,
    ending_inputs,
    loss_inputs,
    memory_inputs,
    offloading_inputs,
    saving_inputs,
    validation_inputs,
)
from .late_widgets import choice_inputs, late_inputs, optimizer_inputs
from .noise_widgets import noise_inputs, shift_and_guidance_inputs, weighting_inputs

NEW_RUN = "new run"


def training_inputs() -> list:
    """All widgets; what is not among the first is folded away."""
    return [
        *main_inputs(),
        *advanced(
            [
                *filter_inputs(),
                *course_inputs(),
                *loss_inputs(),
                *memory_inputs(),
                *validation_inputs(),
                *saving_inputs(),
                *weighting_inputs(),
                *noise_inputs(),
                *offloading_inputs(),
                *ending_inputs(),
                *shift_and_guidance_inputs(),
                *late_inputs(),
                *optimizer_inputs(),
                *choice_inputs(),
            ]
        ),
    ]


def main_inputs() -> list:
    """What is set for nearly every run."""
    return [
        io.Int.Input(
            "steps",
            default=SETTINGS.steps,
            min=1,
            max=1_000_000,
            tooltip="Updates to make. 300 to 1000 suit a style on 10 to 50 pictures; the paper "
            "makes 5000 on a few hundred.",
        ),
        io.Int.Input(
            "batch_size",
            default=SETTINGS.batch_size,
            min=1,
            max=1024,
            tooltip="Pictures per forward pass, each with its own caption and noise level. Lower it "
            "when memory runs out.",
        ),
        *advanced(
            [threshold_input()]
        ),  # a link that is dropped on the node goes to the first number
        fraction_input(),
        io.Float.Input(
            "learning_rate",
            default=SETTINGS.learning_rate,
            min=0.0,
            max=1.0,
            step=0.0000001,
            tooltip="Peak learning rate. 0 takes 0.0000125 / fraction, at most 0.001, where each layer trains its "
            "share; for a threshold or the smallest of the model the paper's rule, 0.001 * exp(-350 * threshold), "
            "at least 0.00017; by gradient 0.00002 / sqrt(fraction). The chart shows the highest rate. If the pictures hardly change, train longer or "
            "double it.",
        ),
        io.String.Input(
            "output_name",
            default=SETTINGS.output_name,
            tooltip="Name of the run's folder in output/sara; a number is added, so nothing is "
            "overwritten.",
        ),
        io.Int.Input(
            "seed",
            default=SETTINGS.seed,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="The same seed and inputs give the same delta.",
        ),
        io.Int.Input(
            "save_every_steps",
            default=SETTINGS.save_every_steps,
            min=0,
            max=1_000_000,
            tooltip="Steps between two saves of a checkpoint and of the state to resume from. With 0 it "
            "saves at the change of stage, and when the run ends, is cancelled or fails.",
        ),
        io.Int.Input(
            "preview_every_steps",
            default=SETTINGS.preview_every_steps,
            min=0,
            max=1_000_000,
            tooltip="Steps between two rows of previews; one is made before the first step and one "
            "after the last. 0 makes only the last. Has no effect while nothing is connected to "
            "preview.",
        ),
        io.Combo.Input(
            "resume",
            options=[NEW_RUN, *output_folder.resumable_runs()],
            default=NEW_RUN,
            tooltip="A cancelled or failed run to go on with, exactly where it stopped, or a finished "
            "one to give more_steps. Its own settings are used; of the widgets here only "
            "gradient_checkpointing, offloading, weights_on_device, trained_in, save_every_steps, "
            "keep_checkpoints, keep_state, lora_file, trigger_words, patience, put_out, tensorboard, optimizer_moments if it is 8bit, and those of previews count; for more_steps of "
            "a finished run also learning_rate, lr_schedule, warmup_steps and lr_cycles. Press R to refresh the list.",
        ),
        io.Int.Input(
            "more_steps",
            default=0,
            min=0,
            max=1_000_000,
            optional=True,
            tooltip="For a finished run chosen under resume: so many steps more, at the learning rate "
            "and on the course set here. 0 puts out what it has learned.",
        ),
    ]


def course_inputs() -> list:
    """How the steps go."""
    return [
        io.Combo.Input(
            "lr_schedule",
            options=list(SCHEDULES),
            default=SETTINGS.lr_schedule,
            tooltip="Course of the learning rate over the steps. cosine_restarts starts anew lr_cycles times; "
            "constant_then_linear falls in the last fifth.",
        ),
        io.Int.Input(
            "warmup_steps",
            default=SETTINGS.warmup_steps,
            min=0,
            max=100_000,
            tooltip="Steps over which the learning rate rises to its peak.",
        ),
        io.Float.Input(
            "progressive",
            display_name="second_stage_from",
            default=SETTINGS.progressive,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Point of the run, as a share of the steps, from which only weights that are "
            "still below the threshold train on (progressive adjustment in the paper). 0.5 is half "
            "way, 0 turns it off.",
        ),
        io.Float.Input(
            "low_rank_weight",
            default=SETTINGS.low_rank_weight,
            min=0.0,
            max=1.0,
            step=0.00001,
            tooltip="Weight of the pull toward low rank, which keeps the change simple. 0 turns it "
            "off.",
        ),
        io.Float.Input(
            "weight_decay",
            default=SETTINGS.weight_decay,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="Pulls what was learned back toward the base weights.",
        ),
        io.Float.Input(
            "max_grad_norm",
            default=SETTINGS.max_grad_norm,
            min=0.0,
            max=1000.0,
            step=0.01,
            tooltip="Larger gradients are scaled down to this norm. 0 turns it off.",
        ),
        io.Int.Input(
            "grad_accumulation_steps",
            default=SETTINGS.grad_accumulation_steps,
            min=1,
            max=1024,
            tooltip="Forward passes per update: the effect of a larger batch without its memory.",
        ),
    ]
