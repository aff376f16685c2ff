"""Measures what this process may really use of its machine, after every limit on it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from fedra_edge.accelerators import find_accelerators
from fedra_edge.cgroups import GroupLimit, GroupLimits, read_group_limits
from fedra_edge.durable_files import storage_errors
from fedra_edge.protocol.devices import Backend, DeviceProfile

_WORTH_TELLING: Final = 0.2
_SYSTEM_RESERVE: Final = 0.05
"""Share of the machine's memory that is left to the system and its file cache."""

_MAX_TEXT: Final = 200
_MAX_CPUS: Final = 4096.0


@dataclass(frozen=True)
class SiteCaps:
    """What the site allows, whatever the machine has."""

    memory_bytes: int | None = None
    max_layers: int | None = None
    disk_bytes: int | None = None
    threads: int | None = None


NO_CAPS: Final = SiteCaps()


@dataclass(frozen=True)
class MemoryState:
    """Memory of machine and process at one moment, in bytes; no address limit is None.

    ``file_bytes`` is the part of ``resident_bytes`` that mapped files take, program libraries
    above all. The system counts it among what it can drop, for machine and groups alike.
    """

    total_bytes: int
    available_bytes: int
    resident_bytes: int
    virtual_bytes: int
    address_limit_bytes: int | None = None
    file_bytes: int = 0


def measure_device(
    *,
    backend: Backend,
    home: Path,
    caps: SiteCaps,
    cached_bytes: int = 0,
    root: Path = Path("/"),
) -> DeviceProfile:
    """Measure the machine; call it when the training runtime is loaded and nothing else.

    Args:
        backend: The runtime that is loaded.
        home: Where weights will be kept; it need not exist yet.
        caps: The site's own limits.
        cached_bytes: Weights that are on the disk already and may stay or give way.
        root: The file system to read control groups from.
    """
    limits = read_group_limits(root)
    state = _memory_state()
    return DeviceProfile(
        platform=platform.platform()[:_MAX_TEXT],
        python=platform.python_version(),
        backend=backend,
        cpu_count=usable_cpus(_schedulable_cpus(), limits, caps),
        memory_bytes=usable_memory(state, limits, caps),
        baseline_bytes=state.resident_bytes,
        disk_free_bytes=usable_disk(home, caps, cached_bytes),
        accelerators=find_accelerators(),
        max_layers=caps.max_layers,
    )


def measure_usable_memory(
    caps: SiteCaps, most_unbacked_bytes: int | None = None, *, root: Path = Path("/")
) -> int:
    """Measure the most that this process may occupy now.

    Args:
        caps: The site's own limits.
        most_unbacked_bytes: What ``unbacked_bytes`` gave before weights were mapped. Those count
            as occupied when a slice's memory is predicted, whether they have been read or not.
        root: The file system to read control groups from.
    """
    state = _memory_state()
    if most_unbacked_bytes is not None:
        virtual_bytes = min(state.virtual_bytes, state.resident_bytes + most_unbacked_bytes)
        state = replace(state, virtual_bytes=virtual_bytes)
    return usable_memory(state, read_group_limits(root), caps)


def is_other_memory(before_bytes: int, now_bytes: int) -> bool:
    """Tell whether usable memory has changed by so much that plans are worth making anew."""
    return abs(now_bytes - before_bytes) > _WORTH_TELLING * before_bytes


def unbacked_bytes() -> int:
    """Give the address space that this process has and does not occupy."""
    own = psutil.Process().memory_info()
    return max(0, int(own.vms - own.rss))


def usable_memory(state: MemoryState, limits: GroupLimits, caps: SiteCaps) -> int:
    """Give the most that this process may occupy: the tightest of all limits on it."""
    reserve_bytes = int(state.total_bytes * _SYSTEM_RESERVE)
    own_bytes = state.resident_bytes - state.file_bytes
    bounds = [own_bytes + state.available_bytes - reserve_bytes]
    bounds += [_share_of(limit, own_bytes) for limit in limits.memory]
    if state.address_limit_bytes is not None:
        unbacked_bytes = max(0, state.virtual_bytes - state.resident_bytes)
        bounds.append(state.address_limit_bytes - unbacked_bytes)
    if caps.memory_bytes is not None:
        bounds.append(caps.memory_bytes)
    return max(0, min(bounds))


def usable_cpus(schedulable: int, limits: GroupLimits, caps: SiteCaps) -> float:
    """Give how many processors this process gets at once, in fractions where there is a quota."""
    bounds = [float(schedulable), _MAX_CPUS]
    if limits.cpu_count is not None:
        bounds.append(max(limits.cpu_count, 0.01))
    if caps.threads is not None:
        bounds.append(float(caps.threads))
    return min(bounds)


def usable_disk(home: Path, caps: SiteCaps, cached_bytes: int = 0) -> int:
    """Give how many bytes of weights fit on the disk of ``home`` and in the site's quota."""
    existing = next(path for path in (home.absolute(), *home.absolute().parents) if path.exists())
    with storage_errors(f"ask for free space at {existing}"):
        free_bytes = shutil.disk_usage(existing).free + cached_bytes
    return free_bytes if caps.disk_bytes is None else min(free_bytes, caps.disk_bytes)


def _share_of(limit: GroupLimit, own_bytes: int) -> int:
    others_bytes = max(0, limit.used_bytes - own_bytes)
    return limit.limit_bytes - others_bytes


def _memory_state() -> MemoryState:
    machine = psutil.virtual_memory()
    own = psutil.Process().memory_info()
    return MemoryState(
        machine.total,
        machine.available,
        own.rss,
        own.vms,
        _address_limit(),
        file_bytes=getattr(own, "shared", 0),  # which only Linux tells
    )


def _address_limit() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _schedulable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    if sys.platform == "win32":
        return len(psutil.Process().cpu_affinity()) or 1
    return os.cpu_count() or 1
