"""Widgets of SaRA Image Folder that say which captions a picture is learned with."""

from collections.abc import Mapping

from comfy_api.latest import io

from ...sara_core.pictures.caption_variants import VariantRule

RULE = VariantRule()  # its defaults


def caption_inputs() -> list:
    """Return the widgets; they came later than the others, so they are at the end."""
    return [
        io.Boolean.Input(
            "caption_lines",
            default=RULE.lines,
            optional=True,
            tooltip="Each line of a caption file is a caption of its own, and so is each of a list in a "
            "table; one of them is drawn every time the picture comes.",
        ),
        io.Boolean.Input(
            "shuffle_tags",
            default=RULE.shuffle,
            optional=True,
            tooltip="The tags of a caption, separated by commas, come in another order every time.",
        ),
        io.Float.Input(
            "tag_dropout",
            default=RULE.dropout,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip="Share of the tags that are left out every time, so that none is needed to call up "
            "what is learned.",
        ),
        io.Int.Input(
            "keep_tags",
            default=RULE.keep,
            min=0,
            max=1000,
            optional=True,
            tooltip="So many tags at the beginning stay where they are and are never left out. The "
            "trigger word is the first of them.",
        ),
        io.Int.Input(
            "caption_variants",
            default=RULE.count,
            min=1,
            max=1000,
            optional=True,
            tooltip="With shuffle_tags or tag_dropout: captions made of each picture's tags. All are "
            "encoded once and held in main memory; one is drawn every time the picture comes.",
        ),
    ]


def variant_rule(widgets: Mapping) -> VariantRule:
    """Turn the widgets into a rule; those that a workflow does not know are at their defaults."""
    return VariantRule(
        lines=widgets.get("caption_lines", RULE.lines),
        shuffle=widgets.get("shuffle_tags", RULE.shuffle),
        keep=widgets.get("keep_tags", RULE.keep),
        dropout=widgets.get("tag_dropout", RULE.dropout),
        trigger=widgets["trigger"],
        count=widgets.get("caption_variants", RULE.count),
        seed=widgets["seed"],
    )
