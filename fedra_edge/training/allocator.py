"""Makes the C library give large freed buffers back to the system at once."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any, Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_LARGE_BYTES: Final = 2**17


def return_freed_memory() -> bool:
    """Let every buffer over 128 KiB be a mapping of its own, unmapped when freed.

    glibc otherwise raises that threshold as buffers are freed and keeps them in a heap that
    fragments. This holds for the whole process from here on, and is what makes the peak memory of
    training predictable; it costs page faults. All threads share one heap, because glibc reserves
    64 MB of address space for each further one, which an address limit counts.

    Returns:
        Whether the C library took the settings; others than glibc need none or take none.
    """
    mallopt = _of_c_library("mallopt")
    if mallopt is None:
        return False
    wanted = (
        (_M_MMAP_THRESHOLD, _LARGE_BYTES),
        (_M_TRIM_THRESHOLD, _LARGE_BYTES),
        (_M_ARENA_MAX, 1),
    )
    return all(mallopt(name, value) == 1 for name, value in wanted)


def prefer_huge_pages() -> None:
    """Ask PyTorch to put large buffers on huge pages, where Linux leaves that to programs.

    It makes page faults fewer and changes nothing of what is occupied. It must be said before
    PyTorch allocates for the first time; a choice that the environment made stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def trim_heap() -> None:
    """Give what lies unused in the heap back to the system now."""
    malloc_trim = _of_c_library("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_c_library(name: str) -> Any:  # noqa: ANN401 (a foreign function has no type)
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
