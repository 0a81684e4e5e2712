"""Which concepts are looked at: a subject beside what a base knows, what is measured, and what is kept."""

import torch

from ..emoji64 import BASE_STYLES as OLD_STYLES

SUBJECT = "blue cat"  # goes for a style of its own, though drawn and captioned as the first of the base's styles
RELATIVES = ("cat face", "cat", "black cat", "tiger face", "dog face")  # that the base knows
SEED = 7  # of what is drawn to be kept


def measured_of(base, style, unseen):
    """Concepts at which it is measured what the base still knows of its own styles, as numbers."""
    known = torch.from_numpy(base.drawn[OLD_STYLES[0]]) if style == SUBJECT else unseen
    return known[:: max(1, len(known) // 120)]


def known_concepts(base, old, style, shown):
    """Concepts that a style of the base draws and that it is not measured on, as numbers.

    Those that are shown in the new style; where that is a subject, others than it is measured on.
    """
    drawn = torch.from_numpy(base.drawn[old])
    if style != SUBJECT:
        return drawn[torch.isin(drawn, shown)]
    relatives = torch.tensor([base.names.index(name) for name in RELATIVES])
    others = ~torch.isin(drawn, torch.cat([measured_of(base, style, shown), relatives]))
    generator = torch.Generator().manual_seed(SEED)
    return drawn[others][torch.randperm(int(others.sum()), generator=generator)]
