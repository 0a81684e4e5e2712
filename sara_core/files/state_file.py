"""Write and read the state of a run: one safetensors file, nothing in it can execute code."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import replace_atomically

FORMAT = "sara-state-1"
TEXT, MOST_TEXT = (
    "text",
    1 << 25,
)  # a tensor of longer text than that: a header holds 100 MB at most


def snapshot(state):
    """Copy a state's tensors to the CPU, so that it can be written while the run goes on.

    Args:
        state: Nested dicts, lists and tuples of tensors and plain values.
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True).contiguous()
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [snapshot(value) for value in state]
    return state


def write_state(path: str | os.PathLike, state: dict) -> None:
    """Write a state so that the file is either whole or not replaced.

    Args:
        path: File to write; its folder must exist.
        state: Nested dicts, lists and tuples of CPU tensors, numbers, text, booleans and None.
            Tuples come back as lists.

    Raises:
        OSError: The file cannot be written; what was there before still is.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_take_tensors(state, tensors))
    metadata = {"format": FORMAT, "state": text, "sha256": _digest(text, tensors)}
    if len(text) > MOST_TEXT:
        tensors[TEXT] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        del metadata["state"]
    replace_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata))


def read_state(path: str | os.PathLike) -> dict:
    """Read a state, checking that nothing in it has changed.

    Raises:
        ValueError: Not a state file, or a damaged one.
        FileNotFoundError: No such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such state of a run: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its metadata lack format = {FORMAT!r}")
        text = metadata.get("state", "")
        if TEXT in tensors:
            text = tensors.pop(TEXT).numpy().tobytes().decode()
        if metadata.get("sha256") != _digest(text, tensors):
            raise ValueError("its contents do not fit its checksum, the file is damaged")
        return _put_tensors(json.loads(text), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used to resume a run: {error}") from error


def _take_tensors(value, tensors: dict[str, Tensor]):
    if isinstance(value, Tensor):
        name = f"t{len(tensors):06}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs, since keys may be numbers
        return {"items": [[key, _take_tensors(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_take_tensors(item, tensors) for item in value]
    return value


def _put_tensors(value, tensors: dict[str, Tensor]):
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _put_tensors(item, tensors) for key, item in value["items"]}
    return value


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
