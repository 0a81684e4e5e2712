"""Strengths of single blocks of a delta, written as lines of text."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from ..weights.analysis import block_of
from .delta_file import DeltaEntry
from .sparse_delta import SparseDelta


def blocks_in(delta: SparseDelta) -> list[str]:
    """List the blocks a delta changes, such as "output_blocks.3", in its order."""
    return list(dict.fromkeys(map(block_of, delta.entries)))


def parse_strengths(text: str, blocks: Sequence[str], others: float = 1.0) -> dict[str, float]:
    """Read lines such as `output_blocks.3: 0.5`; a name may hold wildcards, later lines win.

    Args:
        text: Lines; empty ones and what follows a `#` are skipped.
        blocks: Names that exist.
        others: Strength of blocks no line names.

    Returns:
        Strength by block, all of `blocks` in their order.

    Raises:
        ValueError: A line without a name and a finite number, or a name that no block has.
    """
    strengths = dict.fromkeys(blocks, others)
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        pattern, _, value = (part.strip() for part in line.rpartition(":"))
        try:
            strength = float(value)
        except ValueError:
            strength = float("nan")
        if not pattern or not abs(strength) < float("inf"):
            raise ValueError(
                f"line {number} is {line!r}; expected a block and a number, such as "
                f"{blocks[0] if blocks else 'output_blocks.3'}: 0.5"
            )
        matches = [block for block in blocks if fnmatchcase(block, pattern)]
        if not matches:
            raise ValueError(
                f"line {number} names {pattern!r}, which is no block of this delta; it has "
                f"{', '.join(blocks)}"
            )
        strengths |= dict.fromkeys(matches, strength)
    return strengths


def scale_blocks(delta: SparseDelta, strengths: Mapping[str, float]) -> SparseDelta:
    """Multiply each block's change by its strength; blocks of strength 0 are left out.

    Without some of its layers a delta no longer fits its fingerprint, which then is left out, too.
    """
    entries = {}
    for name, entry in delta.entries.items():
        strength = strengths[block_of(name)]
        if strength:
            values = entry.values.float() * strength
            entries[name] = DeltaEntry(entry.index, values, entry.shape)
    is_whole = len(entries) == len(delta.entries)
    kept = {k: v for k, v in delta.metadata.items() if is_whole or k != "sara.fingerprint"}
    return SparseDelta(entries, kept)
