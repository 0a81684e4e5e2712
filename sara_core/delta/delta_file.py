"""Write and read a SaRA delta: one safetensors file, specified in docs/delta-format.md."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files.atomic import replace_atomically
from . import packed_positions

FORMAT, VERSION = "sara-delta", "1"
VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_DIMS = 8


@dataclass(frozen=True)
class DeltaEntry:
    """Change of one parameter.

    Args:
        index: Shape `(k,)`, int32 (int64 for 2**31 weights or more), flat row-major positions,
            strictly ascending.
        values: Shape `(k,)`, floating point: learned minus base.
        shape: Shape of the parameter.
    """

    index: Tensor
    values: Tensor
    shape: tuple[int, ...]


def write_entries(
    path: str | os.PathLike,
    entries: Mapping[str, DeltaEntry],
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a delta file so that it is either whole or not there; an existing one is replaced.

    Args:
        path: File to write; its folder must exist.
        entries: Changes by parameter name.
        metadata: Text kept with it. Keys that describe the file itself are set here.
        dtype: Of the values: float16, bfloat16 or float32.

    Raises:
        ValueError: Another dtype, a value that is not finite in it, or an empty delta.
        OSError: The file cannot be written; nothing is left behind then.
    """
    if dtype not in VALUE_DTYPES:
        raise ValueError(f"values cannot be saved as {dtype}; expected one of {VALUE_DTYPES}")
    entries = {name: entry for name, entry in entries.items() if len(entry.index)}
    if not entries:
        raise ValueError("the delta is empty: no weight was changed, so there is nothing to save")
    counts = [len(entry.index) for entry in entries.values()]
    values = torch.empty(sum(counts), dtype=dtype)
    for part, entry in zip(values.split(counts), entries.values(), strict=True):
        part.copy_(entry.values.detach())
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        packing = threads.map(_pack_positions, entries.values())
        digest = hashlib.sha256(_bytes(values))
        blocks = []
        for width, block in packing:
            digest.update(block.data)
            blocks.append((width, block))
    table = [
        [name, list(entry.shape), len(entry.index), width, len(packed)]
        for (name, entry), (width, packed) in zip(entries.items(), blocks, strict=True)
    ]
    if not _all_finite(values):
        raise ValueError(
            f"the delta holds values that are NaN, infinite or too large for {dtype}: the training "
            "has diverged, or float32 is needed"
        )
    packed = torch.from_numpy(np.concatenate([block for _, block in blocks]))
    tensors = {"values": values, "positions": packed}
    text = {
        **metadata,
        "sara.format": FORMAT,
        "sara.version": VERSION,
        "sara.num_values": str(len(values)),
        "sara.parameters": json.dumps(table, separators=(",", ":")),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://arxiv.org/abs/2409.06633",
        "modelspec.hash_sha256": "0x" + digest.hexdigest(),
    }
    text.setdefault("modelspec.title", Path(path).stem)
    text.setdefault("modelspec.architecture", "unknown/sara")
    replace_atomically(Path(path), lambda temporary: save_file(tensors, temporary, text))


def read_entries(path: str | os.PathLike) -> tuple[dict[str, DeltaEntry], dict[str, str]]:
    """Read a delta file, checking it whole.

    Returns:
        Changes by parameter name, on the CPU, and the file's text metadata.

    Raises:
        ValueError: Not a delta file, or a damaged one; the message names the file and the fault.
        FileNotFoundError: No such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such delta file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            keys = list(file.keys())
            _refuse_foreign(metadata, keys)
            table = _parse_table(metadata)
            tensors = {key: file.get_tensor(key) for key in keys}
        return _unpack(table, tensors, metadata), metadata
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be used as a SaRA delta: {error}") from error


def _refuse_foreign(metadata: Mapping[str, str], keys: list[str]) -> None:
    if metadata.get("sara.format") != FORMAT:
        lora = any("lora" in key.lower() for key in keys)
        what = (
            "it looks like a LoRA; load it with Load LoRA" if lora else "it is another kind of file"
        )
        raise ValueError(f"its metadata lack sara.format = {FORMAT!r}; {what}")
    if metadata.get("sara.version") != VERSION:
        raise ValueError(
            f"it is of format version {metadata.get('sara.version')!r}, this reads {VERSION}; "
            "update the node pack"
        )
    for key, kind in (("sara.threshold", float), ("sara.steps", int)):
        try:
            kind(metadata.get(key, 0))
        except ValueError as error:
            raise ValueError(f"its {key} is {metadata[key][:40]!r}, expected a number") from error
    if sorted(keys) != ["positions", "values"]:
        raise ValueError(f"it holds the tensors {sorted(keys)[:5]}, expected positions and values")


def _parse_table(metadata: Mapping[str, str]) -> list[tuple[str, tuple[int, ...], int, int, int]]:
    try:
        rows = json.loads(metadata.get("sara.parameters", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its table sara.parameters is not readable JSON ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError("its table sara.parameters is not a list of parameters")
    table, names = [], set()
    for row in rows:
        if not (isinstance(row, list) and len(row) == 5 and isinstance(row[1], list)):
            raise ValueError(
                f"row {str(row)[:80]} of its table is not [name, shape, k, width, bytes]"
            )
        name, shape, *numbers = row
        if not isinstance(name, str) or name in names or len(name) > 1000:
            raise ValueError(f"its table names {str(name)[:80]!r} twice, too long or not by text")
        if len(shape) > MAX_DIMS:
            raise ValueError(f"{name!r} has {len(shape)} dimensions in its table")
        if any(type(n) is not int or not 0 <= n < 1 << 60 for n in (*shape, *numbers)):
            raise ValueError(f"numbers of {name!r} in its table are not whole or out of range")
        if not 0 < numbers[0] <= math.prod(shape) < 1 << 60:
            raise ValueError(f"{name!r} of shape {shape} cannot have {numbers[0]} trained weights")
        names.add(name)
        table.append((name, tuple(shape), *numbers))
    return table


def _unpack(
    table, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, DeltaEntry]:
    values, packed = tensors["values"], tensors["positions"]
    if values.dtype not in VALUE_DTYPES or values.dim() != 1:
        raise ValueError(f"its values are {values.dtype} of {values.dim()} dimensions")
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"its positions are {packed.dtype} of {packed.dim()} dimensions")
    num_values, num_bytes = sum(row[2] for row in table), sum(row[4] for row in table)
    if num_values != len(values) or num_bytes != len(packed):
        raise ValueError(
            f"its table announces {num_values} values and {num_bytes} bytes of positions, but "
            f"{len(values)} and {len(packed)} are there"
        )
    blocks = packed.split([row[4] for row in table])
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        unpacking = threads.map(_unpack_positions, table, blocks)
        values = values.clone()  # otherwise the file stays open, and cannot be replaced on Windows
        _refuse_damage(values, packed, metadata.get("modelspec.hash_sha256"))
        indices = list(unpacking)
    parts = values.split([row[2] for row in table])
    return {
        row[0]: DeltaEntry(index, part, row[1])
        for row, index, part in zip(table, indices, parts, strict=True)
    }


def _refuse_damage(values: Tensor, packed: Tensor, expected: str | None) -> None:
    if expected is not None:
        digest = hashlib.sha256(_bytes(values))
        digest.update(_bytes(packed))
        if expected != "0x" + digest.hexdigest():
            raise ValueError("its contents do not fit its checksum, the file is damaged")
    if not _all_finite(values):
        raise ValueError("it holds values that are NaN or infinite")


def _pack_positions(entry: DeltaEntry) -> tuple[int, np.ndarray]:
    return packed_positions.encode(entry.index.cpu().numpy())


def _unpack_positions(row, block: Tensor) -> Tensor:
    name, shape, count, width, _ = row
    try:
        return torch.from_numpy(
            packed_positions.decode(block.numpy(), width, count, math.prod(shape))
        )
    except ValueError as error:
        raise ValueError(f"positions of {name!r}: {error}") from error


def _all_finite(values: Tensor) -> bool:
    return bool(torch.stack(values.aminmax()).isfinite().all())  # NaN comes through as both


def _bytes(tensor: Tensor) -> memoryview:
    # safetensors lays larger dtypes out first: values, then positions, are the file's data section.
    return tensor.view(torch.uint8).numpy().data
