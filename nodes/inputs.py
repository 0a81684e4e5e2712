"""Inputs that several nodes share, and what they mean to the core."""

import dataclasses

from comfy_api.latest import io

from ..sara_core.weights.cutoff import ZEROS

CHOOSE = "choose a"  # in place of a file, where there may be none yet


def chosen(what: str, found: list[str]) -> list[str]:
    """Options of a list of files that begins with the request to choose one."""
    return [f"{CHOOSE} {what}", *found]


def refuse_unchosen(name: str | None, hint: str) -> str | bool:
    """Return what `validate_inputs` says of a name from such a list; a linked one is None."""
    is_unchosen = isinstance(name, str) and name.startswith(CHOOSE)
    return f"{name} first: {hint}" if is_unchosen else True


def advanced(inputs: list) -> list:
    """Have the page fold inputs away until they are asked for."""
    for entry in inputs:
        entry.extra_dict = {**(entry.extra_dict or {}), "advanced": True}
    return inputs


def searched_as(*words: str) -> dict:
    """Return the part of a Schema that has the node search find a node by other words too."""
    is_known = any(field.name == "search_aliases" for field in dataclasses.fields(io.Schema))
    return {"search_aliases": list(words)} if is_known else {}  # since 0.33


def threshold_input():
    """Widget for the magnitude below which weights are meant."""
    return io.Float.Input(
        "threshold",
        default=0.0,
        min=0.0,
        max=10.0,
        step=0.000001,
        tooltip="Weights of the whole model with a magnitude below this are selected, instead of a fraction; "
        "the histogram of SaRA Analyze shows how many. 0 takes the fraction. The paper uses 0.0002 to "
        "0.002 for Stable Diffusion 1.5.",
    )


def fraction_input():
    """Widget for the share of weights that is meant."""
    return io.Float.Input(
        "fraction",
        default=0.1,
        min=0.0001,
        max=1.0,
        step=0.0001,
        tooltip="Share of the weights to select, the smallest ones. Not used while a "
        "threshold is set or, in SaRA Analyze, a count. 0.1 is 10 %; 0.05 to 0.2 is usual.",
    )


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
            display_name="exact_zeros",
            options=list(ZEROS),
            default="auto",
            tooltip="Weights that are exactly zero come from padding or pruning, and often never "
            "get a gradient. auto selects them unless they would be most of the selection, and "
            "always in 8-bit models, where they are small weights that were rounded; skip never "
            "selects them, train always.",
        ),
    ]


def strength_input(name: str, default: float, tooltip: str):
    """Widget for the strength of a delta."""
    return io.Float.Input(name, default=default, min=-10.0, max=10.0, step=0.01, tooltip=tooltip)
