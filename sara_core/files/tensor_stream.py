"""Write a safetensors file a piece at a time, so that nothing of it need be in memory whole."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .atomic import replace_atomically

ALIGNMENT = 8  # of where the tensors begin


class TensorStream:
    """The tensors of a file that is being written, one after the other.

    Attributes:
        digest: SHA-256 of what was written so far.
        size: How many bytes that is.
    """

    def __init__(self, file: BinaryIO):
        self.digest, self.size = hashlib.sha256(), 0
        self._file = file

    def write(self, piece) -> None:
        """Write the next bytes, given as anything with a buffer of bytes."""
        self.digest.update(piece)
        self._file.write(piece)
        self.size += len(piece)

    def flush(self) -> None:
        """Have what was written so far on the disk, while the next pieces are made elsewhere."""
        self._file.flush()
        os.fsync(self._file.fileno())


def write_streamed(path: Path, room: int, write: Callable[[TensorStream], dict]) -> None:
    """Write a safetensors file so that it is either whole or not there.

    Args:
        path: File to make or replace; its folder must exist.
        room: Bytes that the header needs at most; the rest is filled with blanks, as the format allows.
        write: Writes all tensors into the stream it gets, and returns the header: by name `dtype`, `shape` and
            `data_offsets`, which must be those of the format (https://github.com/huggingface/safetensors), and
            texts under `__metadata__`.

    Raises:
        OSError: The file cannot be written; nothing is left behind then.
        ValueError: The header does not fit into its room.
    """
    room += -room % ALIGNMENT

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.seek(8 + room)
            header = json.dumps(write(TensorStream(file)), separators=(",", ":")).encode()
            if len(header) > room:
                raise ValueError(f"the header has {len(header)} bytes, more than the {room} left")
            file.seek(0)
            file.write(room.to_bytes(8, "little") + header.ljust(room))

    replace_atomically(path, fill)
