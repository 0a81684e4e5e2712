"""The widgets of SaRA Image Folder."""

from dataclasses import replace

from comfy_api.latest import io

from ...sara_core.pictures.buckets import CROPS, SizeRule
from .. import host
from ..inputs import advanced
from .caption_inputs import caption_inputs, variant_rule
from .folder_plan import FolderOptions

GIGABYTE = 1 << 30
SHOWN = {"size", "flip", "trigger", "default_caption", "repeats"}  # the rest is folded away


def folder_inputs() -> list:
    """Widgets of SaRA Image Folder, in the order people think of them."""
    inputs = [*_size_inputs(), *_content_inputs(), *caption_inputs(), *_late_inputs()]
    advanced([entry for entry in inputs if entry.id not in SHOWN])
    return inputs


def _size_inputs() -> list:
    return [
        io.Int.Input(
            "size",
            default=0,
            min=0,
            max=4096,
            tooltip="Pictures are trained at the area of a square with this side: 512 for Stable "
            "Diffusion 1.5, 1024 for SDXL, SD3 and newer. 0 takes that of the model connected.",
        ),
        io.Int.Input(
            "max_buckets",
            default=5,
            min=1,
            max=64,
            tooltip="At most so many sizes of equal area, from tall to wide. Fewer fill batches better; "
            "with more of them less is cropped off.",
        ),
        io.Int.Input(
            "divisible_by",
            default=0,
            min=0,
            max=512,
            tooltip="Widths and heights are multiples of this. 0 takes an eighth of the size, at "
            "most 64; without cropping, what the VAE needs.",
        ),
        io.Combo.Input(
            "crop",
            options=list(CROPS),
            default="centre",
            tooltip="Which part is kept where a picture does not have the shape of its size. none "
            "gives every picture a size of its own shape, at the price of smaller batches.",
        ),
        io.Int.Input(
            "crops",
            default=1,
            min=1,
            max=16,
            tooltip="Windows taken of each picture, each an entry of its own.",
        ),
        io.Float.Input(
            "max_upscale",
            default=1.25,
            min=0.1,
            max=8.0,
            step=0.05,
            tooltip="Pictures are enlarged up to this factor. Smaller ones are trained at a smaller "
            "area, and left out if even a quarter of the side is too much.",
        ),
        io.Boolean.Input(
            "flip",
            default=False,
            tooltip="Add every picture mirrored as well. Not for faces, writing or anything with a "
            "left and a right.",
        ),
    ]


def _content_inputs() -> list:
    return [
        io.Combo.Input(
            "alpha",
            options=["background", "mask"],
            default="background",
            tooltip="Transparent areas are filled with the background. With mask they also do not "
            "count in the loss; connect masks to SaRA Train.",
        ),
        io.String.Input(
            "background",
            default="white",
            tooltip="Colour under transparent areas, such as white or #808080.",
        ),
        io.String.Input(
            "trigger",
            display_name="trigger_word",
            default="",
            tooltip="A word that calls up what is learned, put before every caption that does not hold "
            "it yet. Set trigger_words in SaRA Train as well, and the file says it.",
        ),
        io.Combo.Input(
            "parentheses",
            options=["text", "emphasis"],
            default="text",
            optional=True,
            tooltip="What parentheses in captions mean: text, as in tags such as saber (fate), or "
            "ComfyUI's emphasis, as in (cat:1.2).",
        ),
        io.String.Input(
            "default_caption", default="", tooltip="For pictures without a caption of their own."
        ),
        io.Int.Input(
            "repeats",
            default=1,
            min=1,
            max=1000,
            tooltip="Times every picture comes in an epoch, multiplied with the repeats in folder names.",
        ),
        io.Boolean.Input(
            "subfolders",
            default=False,
            optional=True,
            tooltip="Take the pictures of all folders in it as well, at any depth. Folders such as "
            "10_name are always taken.",
        ),
        io.Combo.Input(
            "problems",
            options=["skip", "refuse"],
            default="skip",
            tooltip="What to do about files that are not used: skip leaves them out and names them in the "
            "report, refuse stops and names them all.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="Seed of random crops, and of shuffled tags.",
        ),
        io.Float.Input(
            "cache_gb",
            default=4.0,
            min=0.0,
            max=1000.0,
            step=0.5,
            tooltip="Encoded pictures and captions are kept on disk up to this size; those used "
            "longest ago go first. 0 keeps none.",
        ),
    ]


def _late_inputs() -> list:
    return [
        io.String.Input(
            "more_sizes",
            default="",
            optional=True,
            tooltip="Further sizes, such as 512, 768: every picture is trained at each of them as well as at "
            "the size above, so that what is learned holds at all of them. Sizes that a picture is too "
            "small for are left out.",
        )
    ]


def _more_sizes(text: str, first: SizeRule) -> tuple[SizeRule, ...]:
    """Read sizes separated by commas or spaces, the first one's other rules for all.

    Raises:
        ValueError: Not whole numbers, or too small for the VAE.
    """
    sizes = text.replace(",", " ").split()
    if wrong := [size for size in sizes if not size.isdecimal()]:
        raise ValueError(
            f"more_sizes holds {wrong[0]!r}; expected sides in pixels such as 512, 768, or nothing"
        )
    rules = (replace(first, side=int(size)) for size in sizes)
    return tuple(dict.fromkeys(rule for rule in rules if rule != first))


def folder_options(unit: int, model=None, **widgets) -> tuple[FolderOptions, int]:
    """Turn the widgets into options, and the size of the cache in bytes.

    Raises:
        ValueError: The size is 0 and there is no model to take it from, or sizes that are none.
    """
    if not widgets["size"] and model is None:
        raise ValueError(
            "size is 0, which takes the size that the model was trained at, but no model is "
            "connected; connect Load Checkpoint's MODEL to model, or set size: 512 for Stable "
            "Diffusion 1.5, 1024 for SDXL and newer"
        )
    size = SizeRule(
        side=widgets["size"] or host.trained_side(model),
        unit=unit,
        step=widgets["divisible_by"],
        max_buckets=widgets["max_buckets"],
        max_upscale=widgets["max_upscale"],
        crop=widgets["crop"],
    )
    same = ("crops", "flip", "background", "trigger", "default_caption", "repeats", "seed")
    options = FolderOptions(
        size,
        use_alpha=widgets["alpha"] == "mask",
        refuse=widgets["problems"] == "refuse",
        emphasis=widgets.get("parentheses") == "emphasis",
        recurse=widgets.get("subfolders", False),
        variants=variant_rule(widgets),
        more_sizes=_more_sizes(widgets.get("more_sizes", ""), size),
        **{name: widgets[name] for name in same},
    )
    return options, int(widgets["cache_gb"] * GIGABYTE)
