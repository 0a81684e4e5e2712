"""Write and read a SaRA delta: one safetensors file, specified in docs/delta-format.md."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.tensor_stream import TensorStream, write_streamed
from . import packed_positions

FORMAT, VERSION = "sara-delta", "1"
VALUE_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
MAX_DIMS = 8
SIZE_LIMIT = 1 << 60  # of any number of weights or bytes
HASH = "modelspec.hash_sha256"


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
        raise ValueError(f"values cannot be saved as {dtype}; expected one of {list(VALUE_DTYPES)}")
    entries = {name: entry for name, entry in entries.items() if len(entry.index)}
    if not entries:
        raise ValueError("the delta is empty: no weight was changed, so there is nothing to save")
    text = {
        **metadata,
        "sara.format": FORMAT,
        "sara.version": VERSION,
        "sara.num_values": str(sum(len(entry.index) for entry in entries.values())),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://arxiv.org/abs/2409.06633",
    }
    text.setdefault("modelspec.title", Path(path).stem)
    text.setdefault("modelspec.architecture", "unknown/sara")
    largest = _header(
        entries, [(packed_positions.MAX_WIDTH, SIZE_LIMIT)] * len(entries), dtype, text
    )
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as threads:
        packing = threads.map(_pack_positions, entries.values())

        def write(stream: TensorStream) -> dict:
            for entry in entries.values():
                stream.write(_bytes(_finite_values(entry, dtype)))
            stream.flush()
            sizes: list[tuple[int, int]] = []
            for width, block in packing:
                stream.write(block.data)
                sizes.append((width, len(block)))
            digest = "0x" + stream.digest.hexdigest()
            return _header(entries, sizes, dtype, {**text, HASH: digest})

        room = len(json.dumps(largest)) + len(HASH) + 100
        write_streamed(Path(path), room, write)


def _header(
    entries: Mapping[str, DeltaEntry],
    sizes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    text: Mapping[str, str],
) -> dict:
    """Return the header, given width and number of bytes of each entry's packed positions."""
    table: list[list[Any]] = [
        [name, list(entry.shape), len(entry.index), *size]
        for (name, entry), size in zip(entries.items(), sizes, strict=True)
    ]
    count, packed = sum(row[2] for row in table), sum(row[4] for row in table)
    end = count * dtype.itemsize
    parameters = json.dumps(table, separators=(",", ":"))
    return {
        "__metadata__": {**text, "sara.parameters": parameters},
        "values": {"dtype": VALUE_DTYPES[dtype], "shape": [count], "data_offsets": [0, end]},
        "positions": {"dtype": "U8", "shape": [packed], "data_offsets": [end, end + packed]},
    }


def _finite_values(entry: DeltaEntry, dtype: torch.dtype) -> Tensor:
    values = entry.values.detach().to("cpu", dtype).contiguous()
    if not _all_finite(values):
        raise ValueError(
            f"the delta holds values that are NaN, infinite or too large for {dtype}: the training "
            "has diverged, or float32 is needed"
        )
    return values


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
        if any(type(n) is not int or not 0 <= n < SIZE_LIMIT for n in (*shape, *numbers)):
            raise ValueError(f"numbers of {name!r} in its table are not whole or out of range")
        if not 0 < numbers[0] <= math.prod(shape) < SIZE_LIMIT:
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
        _refuse_damage(values, packed, metadata.get(HASH))
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
