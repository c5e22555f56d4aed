"""How the command line's own process gets its memory."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_CHOSEN = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Asks glibc to keep what is freed, for the next step; whether it does.

    Left to itself it gives megabytes back to the system whenever the last tensors of a step are freed, and
    takes a page fault for every 4 KiB of the same memory in the next one, which may be a quarter of a
    step's time. Memory in use then stays at its peak. Nothing is done where the environment says otherwise,
    or under another C library.
    """
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in _CHOSEN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # The largest that it takes: an int, and half of a heap.
    return bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1) and mallopt(_MMAP_THRESHOLD, 32 << 20))
