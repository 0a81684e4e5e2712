"""What this process holds in memory, by Linux."""

import ctypes
import gc
import re
import time
from pathlib import Path


def memory(field):
    """Bytes of a field of the process's status, such as `VmRSS` or `VmHWM`."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def timed(function):
    """Seconds a function takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def growth(function):
    """Return seconds, and how far the peak rises above what was in use before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is kept but free would hide some of it
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    seconds = timed(function)
    return seconds, memory("VmHWM") - before
