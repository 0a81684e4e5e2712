"""Hold a file so that no other process does; the system lets go of it when the process ends."""

import errno
import sys
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def hold(path: Path) -> IO:
    """Lock a file, which is made if need be, until the returned file object is closed.

    Raises:
        BlockingIOError: Another process, or another opener in this one, holds it.
    """
    file = open(path, "a+b")  # noqa: SIM115
    try:
        if sys.platform == "win32":
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return file  # a file system without locks
        file.close()
        raise BlockingIOError(f"{path} is held by another process") from error
    return file
