"""Encoded pictures and captions on disk, so that the next run need not encode them again."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..files.state_file import read_state, snapshot, write_state

NUM_SAMPLES = 64  # of each tensor of a model
ABANDONED = 3600.0  # seconds after which an unfinished file is nobody's


def content_key(**facts) -> str:
    """Return a name for what these facts, plain values, determine: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a digest of a model's weights, from samples spread over every tensor.

    Reading all of a large text encoder would take longer than encoding with it; a fine-tuned or
    merged encoder differs in nearly every weight.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        flat = weight.detach().flatten()
        last, count = max(0, len(flat) - 1), min(NUM_SAMPLES, len(flat))
        where = torch.linspace(0, last, count, dtype=torch.float64)
        sample = flat[where.long().to(flat.device)]
        digest.update(sample.cpu().double().numpy().tobytes())
    return digest.hexdigest()


class EncodingCache:
    """A folder of encodings by key; safe to share between processes.

    An entry is written whole or not at all, and its checksum is tested when it is read, so an entry
    that is damaged, or that another process has deleted meanwhile, is simply not there.

    Args:
        folder: Made when something is kept.
        max_bytes: The entries used longest ago are deleted beyond this, now and then while entries
            are added and by `trim`; 0 finds, keeps and deletes nothing.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._written = 0  # bytes since the last trim

    def off(self) -> "EncodingCache":
        """Return a cache of the same folder that finds and keeps nothing."""
        return EncodingCache(self.folder, 0)

    def get(self, key: str) -> dict | None:
        """Return the entry of a key, or None."""
        path = self._path(key)
        if not self.max_bytes:
            return None
        try:
            entry = read_state(path)
        except (OSError, ValueError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return entry

    def put(self, key: str, entry: dict) -> bool:
        """Keep an entry of tensors and plain values; returns whether there was room for it.

        Raises:
            TypeError: It holds something else, which cannot be kept.
        """
        if not self.max_bytes:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_state(self._path(key), snapshot(entry))
            self._written += self._path(key).stat().st_size
        except OSError:  # a full disk costs time later, not the result
            return False
        if self._written > self.max_bytes / 8:
            self.trim()
        return True

    def trim(self) -> tuple[int, int]:
        """Delete the entries used longest ago. Returns number and bytes of those that are left."""
        self._written = 0
        if not self.max_bytes:
            return 0, 0
        entries = []
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):  # of a process that was killed
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        size = sum(entry[1] for entry in entries)
        left = len(entries)
        for _, length, path in sorted(entries):
            if size <= self.max_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                size, left = size - length, left - 1
        return left, size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
