"""Says how the C library treats large buffers, so that the peak memory of training is known."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any, Final

from fedra_edge.memory_meter import resident_bytes

if sys.platform != "win32":
    import resource

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_LARGE_BYTES: Final = 2**17
_LARGEST_HEAP_BYTES: Final = 2**25
_NEVER: Final = 2**30
_SMALL_SIZES: Final = range(24, 1032, 16)
_SMALL_OBJECTS: Final = 60


def return_freed_memory() -> bool:
    """Let every buffer over 128 KiB be a mapping of its own, unmapped when freed, from here on.

    glibc otherwise raises that threshold as buffers are freed and keeps them in a heap that
    fragments. What lies unused in the heap goes back to the system. It costs page faults. All
    threads share one heap, because glibc reserves 64 MB of address space for each further one,
    which an address limit counts.

    Returns:
        Whether the C library took the settings; others than glibc need none or take none.
    """
    is_set = _set(
        (_M_MMAP_THRESHOLD, _LARGE_BYTES),
        (_M_TRIM_THRESHOLD, _LARGE_BYTES),
        (_M_ARENA_MAX, 1),
    )
    trim_heap()
    return is_set


def keep_freed_memory() -> None:
    """Keep freed buffers for the next of their size, until ``return_freed_memory`` is called.

    It saves the page faults of steps that free and take the same buffers over and over. glibc
    takes no larger threshold than 32 MiB; larger buffers stay mappings of their own. Nothing is
    kept where address space is limited, because a heap seldom gives that back.
    """
    if not _is_address_space_limited():
        _set((_M_MMAP_THRESHOLD, _LARGEST_HEAP_BYTES), (_M_TRIM_THRESHOLD, _NEVER))


def set_small_objects_apart() -> None:
    """Make room for small objects, so that they settle there and not between large buffers.

    A freed buffer serves the next of its size only while nothing has been cut from its edges.
    Small objects that outlive it, such as the nodes of a graph, would be: glibc serves them from
    the best fit. What keeps the room from becoming one large chunk again stays taken, 0.2 MB.
    """
    malloc, free = _of_c_library("malloc"), _of_c_library("free")
    if malloc is None or free is None:
        return
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.argtypes = [ctypes.c_void_p]
    rooms = []
    for size in _SMALL_SIZES:
        for _ in range(_SMALL_OBJECTS):
            rooms.append(malloc(size))
            malloc(_SMALL_SIZES.start)
    for room in rooms:
        free(room)


def own_mapping(size_bytes: int) -> mmap.mmap:
    """Give zeroed memory outside the heap, which goes back once nobody refers to it.

    In the heap, what outlives its neighbours leaves gaps that serve nothing of their size.
    """
    if sys.platform == "win32":
        return mmap.mmap(-1, size_bytes)
    return mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def trim_heap() -> None:
    """Give what lies unused in the heap back to the system now."""
    malloc_trim = _of_c_library("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def trim_heap_beyond(most_bytes: float) -> None:
    """Give back what lies unused in the heap when the process occupies more than it may."""
    if resident_bytes() > most_bytes:
        trim_heap()


def _is_address_space_limited() -> bool:
    if sys.platform == "win32":
        return False
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)


def _set(*settings: tuple[int, int]) -> bool:
    mallopt = _of_c_library("mallopt")
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings)


def _of_c_library(name: str) -> Any:  # noqa: ANN401 (a foreign function has no type)
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
