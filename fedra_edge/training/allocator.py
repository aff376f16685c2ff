"""Makes the C library give large freed buffers back to the system at once."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGE_BYTES: Final = 2**20


def return_freed_memory() -> bool:
    """Let every buffer over 1 MiB be a mapping of its own, unmapped when freed.

    glibc otherwise raises that threshold as buffers are freed and keeps them in a heap that
    fragments. This holds for the whole process from here on, and is what makes the peak memory of
    a streamed walk predictable; it costs page faults.

    Returns:
        Whether the C library took the settings; others than glibc need none or take none.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((_M_MMAP_THRESHOLD, _LARGE_BYTES), (_M_TRIM_THRESHOLD, _LARGE_BYTES))
    return all(mallopt(name, value) == 1 for name, value in wanted)
