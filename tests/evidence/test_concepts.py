from types import SimpleNamespace

import numpy as np
import torch

from .concepts import OLD_STYLES, RELATIVES, SUBJECT, known_concepts, measured_of

NAMES = [*RELATIVES, *(f"concept {number}" for number in range(595))]
BASE = SimpleNamespace(
    names=NAMES, drawn={style: np.arange(n, 600) for n, style in enumerate(OLD_STYLES)}
)


def test_what_is_kept_is_never_what_is_measured():
    shown = torch.arange(0, 600, 15)
    unseen = torch.tensor([n for n in range(600) if n % 15])
    for number, old in enumerate(OLD_STYLES):
        known = known_concepts(BASE, old, "3d", shown)
        assert known.tolist() == [n for n in shown.tolist() if n >= number]
        assert not set(known.tolist()) & set(measured_of(BASE, "3d", unseen).tolist())
    for old in OLD_STYLES:
        known = known_concepts(BASE, old, SUBJECT, torch.tensor([600, 601]))
        measured = measured_of(BASE, SUBJECT, torch.tensor([602, 603]))
        assert len(known) > 300
        assert not set(known.tolist()) & {*measured.tolist(), *range(len(RELATIVES))}
