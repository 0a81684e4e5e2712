"""Widgets of SaRA Train that are folded away: loss, memory, pictures held out, the end, files."""

from comfy_api.latest import io

from ...sara_core.optimizer.adam_moments import KINDS
from ...sara_core.training.objective import LOSSES
from ...sara_core.training.run_settings import (
    COMPUTE_DTYPES,
    LORA_FILES,
    PUT_OUT,
    SAVE_DTYPES,
    TRAINED_IN,
    RunSettings,
)
from ..inputs import strength_input

SETTINGS = RunSettings()  # their defaults


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
            tooltip="Computes parts twice to save memory: a third to a half more time, much less memory with large pictures or batches.",
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
            tooltip="Leaves the model in main memory and copies each layer to the graphics card while the "
            "one before it is computed: for models that do not fit, and slower.",
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


def offloading_inputs() -> list:
    """Where weights and what is trained of them are."""
    return [
        io.Float.Input(
            "weights_on_device",
            default=SETTINGS.weights_on_device,
            min=-1.0,
            max=1000.0,
            step=0.5,
            optional=True,
            tooltip="With offloading: gigabytes of the weights that stay on the graphics card. -1 keeps as "
            "many as fit beside what the run needs, 0 as few as possible. Those that stay need not be "
            "copied in each step.",
        ),
        io.Combo.Input(
            "trained_in",
            options=list(TRAINED_IN),
            default=SETTINGS.trained_in,
            optional=True,
            tooltip="Where trained values and the optimizer's moments are kept. Main memory saves all of "
            "their bytes on the graphics card, about 17 for each trained weight; the update is made by the "
            "processor then, which is slower.",
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


def ending_inputs() -> list:
    """How long it trains, and what it puts out."""
    return [
        io.Int.Input(
            "epochs",
            default=SETTINGS.epochs,
            min=0,
            max=100_000,
            optional=True,
            tooltip="Times to go over all pictures, instead of steps. 0 goes by steps. The chart shows how "
            "many steps it comes to.",
        ),
        io.Int.Input(
            "patience",
            default=SETTINGS.patience,
            min=0,
            max=1000,
            optional=True,
            tooltip="Ends the training once the loss on the pictures held out has not become lower in so "
            "many measurements. 0 makes all steps. Needs validation_split.",
        ),
        io.Combo.Input(
            "put_out",
            options=list(PUT_OUT),
            default=SETTINGS.put_out,
            optional=True,
            tooltip="Which delta the outputs hold: that of the last step, or that with the lowest loss on "
            "the pictures held out, which is kept in the run's folder either way. Needs validation_split.",
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
            tooltip="Keeps what a finished run needs to go on with more_steps: 12 to 20 bytes for "
            "each trained weight, in the run's folder.",
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
