"""Widgets of SaRA Train that came late, as workflows go by their place: selection, average, optimizer, curves."""

from comfy_api.latest import io

from ...sara_core.optimizer.packages import KINDS
from ...sara_core.training.run_settings import SELECT_BY, SELECT_FROM
from .folded_widgets import SETTINGS


def late_inputs() -> list:
    """An average of what is learned, and what is chosen to learn."""
    return [
        io.Combo.Input(
            "select_from",
            options=list(SELECT_FROM),
            default=SETTINGS.select_from,
            optional=True,
            tooltip="What the fraction is taken of. Each layer: the same fraction of every layer, each with a "
            "threshold of its own; on two small models this learned as much or clearly more for what it forgot. "
            "Model: the smallest of the whole model, as in the paper, so that some layers train more than "
            "others. A threshold is for the whole model and leaves this unused.",
        ),
        io.Float.Input(
            "ema_decay",
            default=SETTINGS.ema_decay,
            min=0.0,
            max=0.9999,
            step=0.0001,
            optional=True,
            tooltip="Keeps a running average of the trained values (EMA), which is then what is previewed, "
            "measured, saved and put out: 0.99 averages about the last 100 steps, 0.999 the last 1000. It takes 4 "
            "bytes for each trained weight. Of use at a constant learning rate; after a cosine there is little left "
            "to average. 0 is off.",
        ),
    ]


def optimizer_inputs() -> list:
    """What makes the updates, at which rates, and where the curves are written."""
    return [
        io.Combo.Input(
            "optimizer",
            options=list(KINDS),
            default=SETTINGS.optimizer,
            optional=True,
            tooltip="What makes the updates. prodigy finds the learning rate by itself; leave learning_rate at 0 "
            "then. schedule_free averages what it learns instead of lowering the rate, so lr_schedule does not "
            "count. They need the Python packages prodigyopt and schedulefree, and 4 to 8 bytes more for "
            "each trained weight than adamw.",
        ),
        io.String.Input(
            "layer_rates",
            default=SETTINGS.layer_rates,
            optional=True,
            tooltip="Factors of the learning rate for layers in whose parameter name a pattern occurs, such as "
            "attn=1, *ff*=0.5. Of several patterns the last one counts; all other layers train at 1.",
        ),
        io.Boolean.Input(
            "tensorboard",
            default=SETTINGS.tensorboard,
            optional=True,
            tooltip="Writes losses and learning rate for TensorBoard into the run's folder, beside loss.csv. "
            "Needs the Python package tensorboard.",
        ),
    ]


def choice_inputs() -> list:
    """What says which weights train."""
    return [
        io.Combo.Input(
            "select_by",
            options=list(SELECT_BY),
            default=SETTINGS.select_by,
            optional=True,
            tooltip="What says which weights train. Size: the smallest, as in the paper. Gradient: the fraction of "
            "each layer that learns most from the pictures; with regularisation pictures, what learns most "
            "for what would be lost of these, and the faster the more that is. Before the first step the model goes over some 60 to 200 "
            "pictures for that, several times where memory is short. There is no second stage then.",
        ),
    ]
