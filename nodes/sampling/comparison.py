"""The same pictures with several deltas and strengths, as a table."""

import math

from PIL import Image
from torch import Tensor

from ...sara_core import SparseDelta
from .. import host
from .checkpoint_strip import step_of
from .picture_sheets import labelled_grid, row_of, stack, to_tensor

MAX_CELLS = 400


def parse_strengths(text: str) -> list[float]:
    """Read strengths separated by commas.

    Raises:
        ValueError: None, or one that is not a finite number.
    """
    parts = [part.strip() for part in text.replace("\n", ",").split(",") if part.strip()]
    try:
        strengths = [float(part) for part in parts]
    except ValueError:
        strengths = []
    if not strengths or not all(map(math.isfinite, strengths)):
        raise ValueError(f"strengths are {text!r}; expected numbers such as 0, 0.5, 1")
    return strengths


def steps_of(delta: SparseDelta) -> int:
    """Return how many steps a delta was trained; 0 if it does not say."""
    return step_of(delta.metadata)


def compare(
    patcher,
    deltas: list[SparseDelta],
    strengths: list[float],
    samplings: list[host.Sampling],
    node_id: str | None,
) -> tuple[Tensor, list[Tensor]]:
    """Sample everything with each delta at each strength; strength 0 is sampled once.

    Returns:
        The table, IMAGE `(1, H, W, 3)` in `[0, 1]`; and for each delta, strength and sampling its
        pictures, IMAGE `(n, H, W, 3)`.

    Raises:
        ValueError: A delta that does not fit the model, before anything is sampled; or too many.
    """
    count = len(deltas) * len(strengths)
    if count > MAX_CELLS:
        raise ValueError(f"{count} deltas and strengths are compared; at most {MAX_CELLS} can be")
    for delta in deltas:
        host.apply_delta(patcher, delta, 1.0)
    progress = host.Progress(count, node_id)
    plain: list[Tensor] | None = None
    cells, pictures = [], []
    for delta in deltas:
        row: list[Image.Image] = []
        for strength in strengths:
            if strength == 0 and plain is not None:
                made = plain
            else:
                applied = host.apply_delta(patcher, delta, strength)
                made = [host.sample(applied, sampling) for sampling in samplings]
            plain = made if strength == 0 else plain
            row.append(stack([row_of(batch) for batch in made]))
            pictures += made
            progress.update(len(cells) * len(strengths) + len(row))
        cells.append(row)
    sheet = labelled_grid(cells, [f"strength {s:g}" for s in strengths], [*map(_label, deltas)])
    return to_tensor(sheet), pictures


def _label(delta: SparseDelta) -> str:
    title, steps = delta.metadata.get("modelspec.title", "delta"), steps_of(delta)
    return f"{title}, {steps} steps" if steps else title
