"""What a training learned: a sparse change of a model's weights."""

import json
import logging
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..weights import at_positions
from ..weights.fingerprint import is_same_base
from ..weights.shards import Shard, held, reshard
from .delta_file import DeltaEntry, read_entries, write_entries

FINGERPRINT, BASES = (
    "sara.fingerprint",
    "sara.bases",
)  # metadata; the latter of sums over unequal layers

logger = logging.getLogger("comfyui-sara")


class SparseDelta:
    """Learned minus base weights, by parameter name, at the positions that were trained.

    Immutable: arithmetic returns new deltas. `0.6 * a + 0.6 * b` merges two of the same or of
    different support (arXiv:2409.06633, appendices F and G).

    Args:
        entries: Changes by parameter name.
        metadata: Text that is saved with it, such as "sara.threshold".
    """

    def __init__(
        self, entries: Mapping[str, DeltaEntry], metadata: Mapping[str, str] | None = None
    ):
        self.entries = dict(entries)
        self.metadata = dict(metadata or {})

    @property
    def num_values(self) -> int:
        """Number of weights it changes."""
        return sum(len(entry.index) for entry in self.entries.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter it changes, by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def __repr__(self) -> str:
        return f"SparseDelta({self.num_values} values in {len(self.entries)} parameters)"

    def save(self, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
        """Write it to a safetensors file, atomically; see `delta_file.write_entries`."""
        write_entries(path, self.entries, self.metadata, dtype)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SparseDelta":
        """Read it from a file, onto the CPU; see `delta_file.read_entries`."""
        return cls(*read_entries(path))

    def to(self, dtype: torch.dtype) -> "SparseDelta":
        """Round the values to a dtype; what `save` stores is what this returns."""
        return self._map(lambda values: values.to(dtype))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "SparseDelta":
        entries = {
            name: DeltaEntry(entry.index, change(entry.values), entry.shape)
            for name, entry in self.entries.items()
        }
        return SparseDelta(entries, self.metadata)

    def __mul__(self, strength: float) -> "SparseDelta":
        return self._map(lambda values: values.float() * strength)

    __rmul__ = __mul__

    def __neg__(self) -> "SparseDelta":
        return self * -1.0

    def __sub__(self, other: "SparseDelta") -> "SparseDelta":
        return self + -other

    def __add__(self, other: "SparseDelta") -> "SparseDelta":
        wrong = self.mismatches(other.shapes, missing=False)
        if wrong:
            raise ValueError(
                f"the two deltas belong to models of different shapes: {_listing(wrong)}"
            )
        names = [*self.entries, *(name for name in other.entries if name not in self.entries)]
        entries = {}
        for name in names:
            parts = [d.entries[name] for d in (self, other) if name in d.entries]
            entries[name] = parts[0] if len(parts) == 1 else _sum(*parts)
        both = dict(sorted(self.metadata.items() & other.metadata.items()))
        if FINGERPRINT not in both or self.entries.keys() != other.entries.keys():
            both.pop(FINGERPRINT, None)
            bases = sorted({*self._bases(), *other._bases()})
            both |= {BASES: json.dumps(bases)} if bases else {}
        return SparseDelta(entries, both)

    def _bases(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the fingerprints of the bases of what was added up, with the parameters each is of."""
        if FINGERPRINT in self.metadata:
            return [(self.metadata[FINGERPRINT], tuple(self.entries))]
        try:
            return [
                (one, tuple(names)) for one, names in json.loads(self.metadata.get(BASES, "[]"))
            ]
        except (ValueError, TypeError):
            return [("unreadable", tuple(self.entries))]

    def mismatches(self, shapes: Mapping[str, tuple[int, ...]], missing: bool = True) -> list[str]:
        """List what keeps it from being applied to parameters of these shapes.

        Args:
            shapes: Shape by parameter name.
            missing: Also list parameters it changes that are not there.
        """
        faults = []
        for name, entry in self.entries.items():
            if name not in shapes:
                if missing:
                    faults.append(f"{name} is not in the model")
            elif tuple(shapes[name]) != entry.shape:
                faults.append(f"{name} is {tuple(shapes[name])}, in the delta {entry.shape}")
        return faults

    def fits_base(self, weights: Mapping[str, Tensor]) -> bool:
        """Tell whether it was made on these weights, as far as its fingerprints show.

        Args:
            weights: Weights by parameter name, of the right names and shapes.
        """
        index = {name: entry.index for name, entry in self.entries.items()}
        return all(
            is_same_base(fingerprint, weights, {name: index[name] for name in names})
            for fingerprint, names in self._bases()
            if index.keys() >= set(names)
        )

    @torch.no_grad()
    def apply_to(self, module: nn.Module, strength: float = 1.0) -> Callable[[], None]:
        """Add it to the weights of `module`, in place.

        Args:
            module: Model with the parameters it was trained on; other weights are not touched.
            strength: Factor of the change; 0 changes nothing.

        Returns:
            A function that puts the replaced weights back, bit for bit.

        Raises:
            ValueError: Parameters are missing or of other shapes.
            Exception: Of this or any other kind; nothing has been changed then.
        """
        reshard(module)
        parameters = {
            name: p
            for name, p in module.named_parameters(remove_duplicate=False)
            if name in self.entries
        }
        wrong = self.mismatches({name: p.shape for name, p in parameters.items()})
        if wrong:
            raise ValueError(f"the delta does not fit this model: {_listing(wrong)}")
        if not self.fits_base(parameters):
            logger.warning(
                "this delta was trained on another base than the model it is applied to; shapes "
                "fit, so it is applied, but the result may differ from what was trained"
            )
        replaced: list[tuple[Tensor, Tensor, Tensor]] = []

        def undo() -> None:
            for weight, index, old in reversed(replaced):
                at_positions.write_(weight, index, old)
            reshard(module)

        try:
            for name, entry in self.entries.items() if strength else ():
                weight = held(parameters[name].data)
                own, index = Shard(parameters[name]).in_part(entry.index)
                index = index.to(weight.device)
                positions = index.long()
                old = at_positions.read(weight, positions)
                precise = torch.promote_types(torch.float32, weight.dtype)
                values = entry.values[own].to(weight.device, precise)
                changed = torch.add(old.to(precise), values, alpha=strength)
                replaced.append((weight, index, old))
                at_positions.write_(weight, positions, changed.to(weight.dtype))
        except BaseException:
            undo()
            raise
        reshard(module)
        return undo


def _sum(first: DeltaEntry, second: DeltaEntry) -> DeltaEntry:
    positions = torch.cat([first.index.cpu(), second.index.cpu()])
    index, inverse = torch.unique(positions, return_inverse=True)
    terms = torch.cat([first.values.float().cpu(), second.values.float().cpu()])
    values = torch.zeros(len(index)).index_add_(0, inverse, terms)
    numel = torch.Size(first.shape).numel()
    return DeltaEntry(index.to(at_positions.index_dtype(numel)), values, first.shape)


def _listing(faults: list[str]) -> str:
    more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
    return "; ".join(faults[:10]) + more
