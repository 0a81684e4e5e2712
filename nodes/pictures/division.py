"""Encodings made once where several processes run the workflow: each makes its share, all get everything."""

import itertools
from collections.abc import Callable, Collection, Sequence

from ...sara_core.training.processes import Processes


def divide(
    processes: Processes,
    keys: Sequence[str],
    known: Collection[str],
    make: Callable[[list[str]], dict],
) -> dict:
    """Make what is not known, each process a share of it.

    Args:
        processes: Those that have the same keys.
        keys: Of what is needed in all of them.
        known: Keys of what this one has, which `make` puts out as it is.
        make: Returns entries by key; one that cannot be made is left out.

    Returns:
        Entries that were not known here, by key.

    Raises:
        ValueError: The processes do not need the same.
        OtherProcessFailed: Another one has failed.
    """
    told = processes.gather(lambda: (list(keys), [key for key in keys if key not in known]))
    for rank, (needed, _) in enumerate(told):
        if needed != told[0][0]:
            raise ValueError(
                f"rank {rank} has other pictures, captions, VAE or CLIP than rank 0: {len(needed)} "
                f"encodings, {len(told[0][0])} there; give all of them the same files"
            )
    maker = makers([missing for _, missing in told])
    mine = [key for key, rank in maker.items() if rank == processes.rank]
    made = processes.gather(lambda: make(mine))
    return {key: entry for part in made for key, entry in part.items() if key not in known}


def makers(missing: Sequence[Sequence[str]]) -> dict[str, int]:
    """Say which process puts out what some have not: the first that has it, or one after the other."""
    lacks = [set(keys) for keys in missing]
    turns = itertools.cycle(range(len(missing)))
    found = {}
    for key in dict.fromkeys(itertools.chain(*missing)):
        having = [rank for rank, keys in enumerate(lacks) if key not in keys]
        found[key] = having[0] if having else next(turns)
    return found
