"""Weights that torch's `fully_shard` (FSDP2) has divided over processes: the part held here, and the whole.

Such a weight is a DTensor with the shape of the whole; each process holds some consecutive rows of it. What
is asked about the whole takes all of its processes: they make the same calls in the same order.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .at_positions import index_dtype


def is_sharded(weight: Tensor) -> bool:
    """Tell whether a weight is a DTensor, of which this process may hold a part only."""
    return hasattr(weight, "device_mesh")


def held(weight: Tensor) -> Tensor:
    """Return what this process holds of a weight, without autograd, sharing its memory."""
    if not is_sharded(weight):
        return weight.detach()
    with torch.no_grad():
        return weight.to_local()  # type: ignore[attr-defined]


def total(weight: Tensor, counts: Tensor) -> Tensor:
    """Add up what each process has counted in its part of a weight; `counts` itself if there are no parts.

    Args:
        weight: That was looked at.
        counts: Any shape, on any device. Not modified.
    """
    group, device = _group_of(weight)
    if group is None:
        return counts
    sent = counts.to(device, copy=True)
    dist.all_reduce(sent, group=group)
    return sent.to(counts.device)


class Shard:
    """Where this process's part of a weight lies in the whole; an ordinary weight is one part.

    Args:
        weight: Shape `(*s)`.

    Attributes:
        shape: Of the whole.
        is_part: Whether other processes hold further parts.
        rank: Of this part among them.
    """

    def __init__(self, weight: Tensor):
        self.shape = tuple(weight.shape)
        self._index_dtype = index_dtype(weight.numel())
        self._group, self._device = _group_of(weight)
        self.is_part = self._group is not None
        self._layout = None
        if is_sharded(weight):
            self._layout = (weight.device_mesh, weight.placements)  # type: ignore[attr-defined]
        sizes = self.gather(torch.tensor([held(weight).numel()]))
        self.rank = dist.get_rank(self._group) if self.is_part else 0
        self._start = int(torch.cat(sizes[: self.rank]).sum()) if self.rank else 0
        self._end = self._start + int(sizes[self.rank])

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return the values of every part, in the order of the parts.

        Args:
            values: Shape `(k,)`; k may be another in each process.
        """
        if self._group is None:
            return [values]
        count = torch.tensor([len(values)], device=self._device)
        counts = [torch.empty_like(count) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(counts, count, group=self._group)
        lengths = torch.cat(counts).tolist()
        sent = torch.zeros(max(lengths), dtype=values.dtype, device=self._device)
        sent[: len(values)] = values.detach()
        parts = [torch.empty_like(sent) for _ in lengths]
        dist.all_gather(parts, sent, group=self._group)
        return [part[:n].to(values.device) for part, n in zip(parts, lengths, strict=True)]

    def whole(self, values: Tensor) -> tuple[Tensor, slice]:
        """Return the values of all parts as one, `(n,)`, and which of them are this part's."""
        parts = self.gather(values)
        if len(parts) == 1:
            return values, slice(0, len(values))
        first = sum(map(len, parts[: self.rank]))
        return torch.cat(parts), slice(first, first + len(values))

    def in_whole(self, index: Tensor) -> Tensor:
        """Turn flat positions in this part into those in the whole."""
        if self._start == 0:
            return index.to(self._index_dtype)
        return index.to(self._index_dtype) + self._start

    def in_part(self, index: Tensor) -> tuple[slice, Tensor]:
        """Say which of the whole's sorted flat positions lie in this part, and where in it."""
        if not self.is_part:
            return slice(0, len(index)), index
        bounds = torch.tensor([self._start, self._end], dtype=index.dtype, device=index.device)
        first, last = torch.searchsorted(index, bounds).tolist()
        return slice(first, last), index[first:last] - self._start

    def distributed(self, values: Tensor, num_whole: int) -> Tensor:
        """Return the values `(k,)` of this part as one DTensor `(num_whole,)` over all parts.

        torch takes a norm of it, scales it or looks for infinities in it as in the whole. The values of an
        ordinary weight are returned as they are.
        """
        if self._layout is None:
            return values
        from torch.distributed.tensor import DTensor

        mesh, placements = self._layout
        return DTensor.from_local(
            values, mesh, placements, run_check=False, shape=torch.Size([num_whole]), stride=(1,)
        )


def of_parts(weight: Tensor, count: int) -> tuple[int, int]:
    """Return what has been counted in the parts of a weight before this process's, and in all of them."""
    shard = Shard(weight)
    counts = torch.cat(shard.gather(torch.tensor([count])))
    return int(counts[: shard.rank].sum()), int(counts.sum())


def value_at(weight: Tensor, position: int) -> Tensor:
    """Return one weight by its flat position in the whole, float32 on the CPU, a scalar."""
    entries, index = Shard(weight).in_part(torch.tensor([position]))
    found = torch.zeros(())
    if entries.start < entries.stop:
        part = held(weight).reshape(-1)
        found = part[int(index)].float().cpu()
    return total(weight, found)


def reshard(module: nn.Module) -> None:
    """Have the parts of a module under `fully_shard` forget what they have put together of their weights.

    A change of weights shows in the next pass then, and the module shows the weights as they are divided.
    """
    for part in _divided_modules(module).values():
        part.reshard()


def refuse_other_divisions(module: nn.Module, parameters: dict[str, Any]) -> None:
    """Raise if weights are divided in another way than `fully_shard` does it by default.

    Args:
        module: The model.
        parameters: Of it, by name.

    Raises:
        ValueError: Naming the first.
    """
    divided = {name: weight for name, weight in parameters.items() if is_sharded(weight)}
    prefixes = [
        f"{name}." if name else "" for name in (_divided_modules(module) if divided else ())
    ]
    for name, weight in divided.items():
        dims = _sharded_dims(weight)
        plain = all(type(weight.placements[at]).__name__ == "Shard" for at in dims)
        if len(dims) > 1 or any(dims.values()) or not plain:
            raise ValueError(
                f"parameter {name!r} is divided over processes by {weight.placements}; SaraAdamW trains "
                "weights that are divided by rows over one dimension of the mesh, as fully_shard does "
                "without a shard_placement_fn"
            )
        if not name.startswith(tuple(prefixes)):
            raise ValueError(
                f"parameter {name!r} is a DTensor that fully_shard (of torch 2.6 or later) has not made for "
                "this module or a part of it; give SaraAdamW the module that fully_shard was called with. "
                "Tensor parallelism alone cannot be trained"
            )
        if held(weight).device.type != weight.device_mesh.device_type:
            raise ValueError(
                f"parameter {name!r} waits on the {held(weight).device.type}, away from the devices it is "
                "divided over; weights under a CPUOffloadPolicy cannot be trained"
            )


def refuse_other_division(name: str, weight: Any, gradient: Any) -> None:
    """Raise if a weight's gradient is divided in another way than the weight.

    Raises:
        RuntimeError: It is.
    """
    if is_sharded(gradient) and gradient.placements != weight.placements:
        raise RuntimeError(
            f"the gradient of parameter {name!r} is divided over processes by {gradient.placements}, the "
            f"parameter by {weight.placements}; train models that fully_shard has divided"
        )


def _divided_modules(module: nn.Module) -> dict[str, Any]:
    """Return the parts of a module that `fully_shard` was called with, by name."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return {name: part for name, part in module.named_modules() if kind and isinstance(part, kind)}


def _sharded_dims(weight: Any) -> dict[int, int | None]:
    """Return which dimension of a weight is divided, by the dimension of the mesh over which it is."""
    return {
        at: getattr(p, "dim", None)
        for at, p in enumerate(weight.placements)
        if not p.is_replicate()
    }


def _group_of(weight: Any) -> tuple["dist.ProcessGroup | None", torch.device | None]:
    """Return the processes that hold the parts of a weight, and the device they exchange numbers on."""
    dims = _sharded_dims(weight) if is_sharded(weight) else {}
    if not dims:
        return None, None
    mesh = weight.device_mesh
    at = next(iter(dims))
    if mesh.size(at) == 1:
        return None, None
    if mesh.device_type == "cpu":
        return mesh.get_group(at), torch.device("cpu")
    accelerator = torch.get_device_module(mesh.device_type)
    return mesh.get_group(at), torch.device(mesh.device_type, accelerator.current_device())
