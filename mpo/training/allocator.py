"""glibc's memory allocator, as training on a CPU wants it."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Ask glibc's allocator to keep freed memory for the next step instead of returning it to the system.

    A training step frees and takes the same gigabytes again and again; given back in between, every page of them is
    cleared and mapped anew in each step. The process holds its peak until it ends.

    Returns:
        Whether the allocator took the settings; False where there is no glibc, which changes nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
