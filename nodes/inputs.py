"""Inputs that several nodes share, and what they mean to the core."""

import torch
from comfy_api.latest import io

SAVE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ZEROS = ["auto", "skip", "train"]


def selection_inputs() -> list:
    """Widgets that say which weights are meant."""
    return [
        io.Float.Input(
            "threshold",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.000001,
            tooltip="Weights with a magnitude below this are selected; the histogram of SaRA Analyze "
            "shows how many. 0 finds the threshold for the fraction below. The paper uses 0.0002 "
            "to 0.002 for Stable Diffusion 1.5.",
        ),
        io.Float.Input(
            "fraction",
            default=0.1,
            min=0.0001,
            max=1.0,
            step=0.0001,
            tooltip="Share of the model's weights to select, the smallest ones. Used while the "
            "threshold is 0 and, in SaRA Analyze, no count is given. 0.1 is 10 %; 0.05 to 0.2 is "
            "usual.",
        ),
    ]


def filter_inputs() -> list:
    """Widgets that narrow the selection down by parameter name."""
    return [
        io.String.Input(
            "include",
            default="",
            tooltip="Only layers in whose parameter name one of these patterns occurs, such as "
            "attn2, *output_blocks*. Several are separated by commas. Empty takes all.",
        ),
        io.String.Input(
            "exclude",
            default="",
            tooltip="No layers in whose parameter name one of these patterns occurs.",
        ),
        io.Combo.Input(
            "zeros",
            options=ZEROS,
            default="auto",
            tooltip="Weights that are exactly zero come from padding or pruning, and often never "
            "get a gradient. auto selects them unless they would be most of the selection, and "
            "always in 8-bit models, where they are small weights that were rounded; skip never "
            "selects them, train always.",
        ),
    ]


def selection_rule(threshold: float, fraction: float, count: str = "") -> dict:
    """Turn the widgets into the core's rule: threshold before count before fraction."""
    if threshold > 0:
        return {"threshold": threshold}
    return {"num_trainable": count} if count.strip() else {"fraction": fraction}


def strength_input(name: str, default: float, tooltip: str):
    """Widget for the strength of a delta."""
    return io.Float.Input(name, default=default, min=-10.0, max=10.0, step=0.01, tooltip=tooltip)
