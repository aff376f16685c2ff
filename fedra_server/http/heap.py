"""Keeps the heap of the process small where the C library is glibc; elsewhere it does nothing."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Final

_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2


def share_heaps() -> None:
    """Let threads share heaps from now on, of which each would otherwise fill one of its own."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_ARENA_MAX, _ARENAS)


def tidy_heap() -> None:
    """Give back what lies unused, as after a start, and look through what is left no more."""
    gc.collect()
    gc.freeze()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
