"""The widgets of SaRA Train, in the order people think of them: the few that matter, then the rest."""

from comfy_api.latest import io

from ...sara_core.optimizer.adam_moments import KINDS
from ...sara_core.optimizer.learning_rate import SCHEDULES
from ...sara_core.training.objective import LOSSES, WEIGHTINGS
from ...sara_core.training.run_settings import (
    COMPUTE_DTYPES,
    LORA_FILES,
    SAVE_DTYPES,
    RunSettings,
)
from .. import output_folder
from ..inputs import advanced, filter_inputs, fraction_input, strength_input, threshold_input

NEW_RUN = "new run"
SETTINGS = RunSettings()  # their defaults


def training_inputs() -> list:
    """All widgets; what is not among the first is folded away."""
    return [
        *main_inputs(),
        *advanced(
            [
                *selection_details(),
                *course_inputs(),
                *loss_inputs(),
                *memory_inputs(),
                *validation_inputs(),
                *saving_inputs(),
                *weighting_inputs(),
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
        fraction_input(),
        io.Float.Input(
            "learning_rate",
            default=SETTINGS.learning_rate,
            min=0.0,
            max=1.0,
            step=0.0000001,
            tooltip="Peak learning rate. 0 takes the paper's rule, 0.001 * exp(-350 * threshold), for "
            "thresholds up to 0.005, and 0.00017 for larger ones; the chart shows the rate it comes to. If "
            "the pictures hardly change, set two to four times that.",
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
            "gradient_checkpointing, offloading, save_every_steps, keep_checkpoints, keep_state, "
            "lora_file, trigger_words, moments if it is 8bit, and those of previews count. Press R to refresh "
            "the list.",
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


def selection_details() -> list:
    """Which weights train, beside their share."""
    return [
        threshold_input(),
        *filter_inputs(),
    ]


def course_inputs() -> list:
    """How the steps go."""
    return [
        io.Combo.Input(
            "lr_schedule",
            options=list(SCHEDULES),
            default=SETTINGS.lr_schedule,
            tooltip="Course of the learning rate over the steps.",
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


def loss_inputs() -> list:
    """What is measured."""
    return [
        io.Combo.Input(
            "loss_function",
            options=list(LOSSES),
            default=SETTINGS.loss_function,
            tooltip="How errors are measured, in the model's own prediction (epsilon, v, flow).",
        ),
        io.Float.Input(
            "caption_dropout",
            default=SETTINGS.caption_dropout,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Share of captions replaced by the empty one, so that guidance goes on working. "
            "Has no effect while nothing is connected to empty.",
        ),
        io.Float.Input(
            "regularisation_weight",
            default=SETTINGS.regularisation_weight,
            min=0.0,
            max=100.0,
            step=0.01,
            tooltip="Weight of the loss on the regularisation pictures, beside 1 for the others. Has "
            "no effect while none are connected.",
        ),
        io.Boolean.Input(
            "allow_other_prediction",
            default=SETTINGS.allow_other_prediction,
            optional=True,
            tooltip="Trains although a node such as ModelSamplingDiscrete makes the model predict "
            "something else than its checkpoint says. Right for v-prediction checkpoints that are not "
            "recognised as such; else the model is ruined.",
        ),
    ]


def memory_inputs() -> list:
    """What makes it fit."""
    return [
        io.Boolean.Input(
            "gradient_checkpointing",
            default=SETTINGS.gradient_checkpointing,
            tooltip="Computes parts twice to save memory: about a third slower, much less memory.",
        ),
        io.Combo.Input(
            "training_dtype",
            options=list(COMPUTE_DTYPES),
            default=SETTINGS.training_dtype,
            tooltip="Precision to compute in; auto is the model's own. What is learned is always "
            "kept in fp32 during training.",
        ),
        io.Boolean.Input(
            "offloading",
            default=SETTINGS.offloading,
            optional=True,  # workflows in API form from before it was there
            tooltip="Leaves most of the model in main memory and copies each layer to the graphics card "
            "when it is used: for models that do not fit, and slower.",
        ),
        io.Combo.Input(
            "moments",
            display_name="optimizer_moments",
            options=list(KINDS),
            default=SETTINGS.moments,
            optional=True,  # workflows in API form from before it was there
            tooltip="Precision of the optimizer's two moments. 8bit saves 6 of about 17 bytes per trained "
            "weight and follows fp32 closely; it needs the Python package torchao.",
        ),
    ]


def validation_inputs() -> list:
    """Pictures held out."""
    return [
        io.Float.Input(
            "validation_split",
            default=SETTINGS.validation_split,
            min=0.0,
            max=0.9,
            step=0.01,
            tooltip="Share of the pictures that are held out. The loss on them, always at the same "
            "noise, tells when the model stops learning and starts memorising. 0 holds out none.",
        ),
        io.Int.Input(
            "validate_every_steps",
            default=SETTINGS.validate_every_steps,
            min=1,
            max=1_000_000,
            tooltip="Steps between two measurements on the pictures held out.",
        ),
    ]


def saving_inputs() -> list:
    """What is kept and shown."""
    return [
        io.Int.Input(
            "keep_checkpoints",
            default=SETTINGS.keep_checkpoints,
            min=1,
            max=1000,
            tooltip="Number of checkpoints to keep; older ones are deleted.",
        ),
        io.Boolean.Input(
            "keep_state",
            default=SETTINGS.keep_state,
            optional=True,
            tooltip="Keeps what a finished run needs to go on with more_steps: about 13 bytes for each "
            "trained weight, in the run's folder.",
        ),
        io.Combo.Input(
            "save_dtype",
            options=list(SAVE_DTYPES),
            default=SETTINGS.save_dtype,
            tooltip="Precision of the saved values.",
        ),
        io.Combo.Input(
            "lora_file",
            options=list(LORA_FILES),
            default=SETTINGS.lora_file,
            optional=True,
            tooltip="Writes a file for Load LoRA beside the final delta, for those without this pack. "
            "Differences are exact and large; a LoRA is small and keeps only part of what was learned: "
            "the chart says how much.",
        ),
        io.String.Input(
            "trigger_words",
            default=SETTINGS.trigger_words,
            tooltip="Words that call up what was learned, if the captions have such; kept in the "
            "file, where Load SaRA Delta shows them.",
        ),
        strength_input(
            "preview_strength",
            SETTINGS.preview_strength,
            "Strength of what was learned so far in the previews, as in Apply SaRA.",
        ),
    ]


def weighting_inputs() -> list:
    """What the noise levels count; last, as saved workflows keep optional widgets by their place."""
    return [
        io.Combo.Input(
            "loss_weighting",
            options=list(WEIGHTINGS),
            default=SETTINGS.loss_weighting,
            optional=True,  # workflows in API form from before it was there
            tooltip="What the noise levels count. none counts all as the family does; min_snr counts low "
            "noise less, so that detail disturbs coarse shapes less; debiased counts high noise more. Both "
            "are for epsilon and v models above all. Validation is not weighted.",
        ),
        io.Float.Input(
            "snr_gamma",
            default=SETTINGS.snr_gamma,
            min=0.001,
            max=1000.0,
            step=0.001,
            optional=True,
            tooltip="Of min_snr: the ratio of signal to noise above which a noise level counts less. "
            "Smaller values have more effect; 5 is usual.",
        ),
    ]
