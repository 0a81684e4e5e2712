"""Write files that are either whole or not there."""

import contextlib
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file in the same folder, flush it to disk and rename it.

    Whatever happens, `path` holds either its old content or the new one.

    Args:
        path: File to make or replace; its folder must exist.
        write: Called with the path to write to.

    Raises:
        OSError: The file cannot be written; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        try:
            write(temporary)
        except SafetensorError as error:  # its name for a full disk, too
            raise OSError(str(error)) from error
        with contextlib.suppress(OSError):  # some network folders have no permissions
            os.chmod(temporary, mode)  # safetensors leaves files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last through a power cut; Windows has no such call."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):  # nor does every file system sync folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
