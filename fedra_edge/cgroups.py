"""Reads what Linux control groups, versions 1 and 2, allow this process, parents included.

Every function takes the root of the file system, so that a recorded tree can stand in for it.
Formats: https://docs.kernel.org/admin-guide/cgroup-v2.html and .../cgroup-v1/memory.html,
mountinfo: proc(5).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

_UNLIMITED_BYTES: Final = 2**60
"""Version 1 states "no limit" as the largest page-aligned number; nothing real comes close."""

_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_V1_CONTROLLERS: Final = frozenset({"memory", "cpu"})


@dataclass(frozen=True)
class GroupLimit:
    """A memory limit and what the whole group uses of it, without what can be dropped at once."""

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class GroupLimits:
    """All limits on the way from this process's groups up to the root."""

    memory: tuple[GroupLimit, ...] = ()
    cpu_count: float | None = None


@dataclass(frozen=True)
class _Mount:
    version: int
    controllers: frozenset[str]
    group_root: PurePosixPath
    directory: Path


def read_group_limits(root: Path = Path("/")) -> GroupLimits:
    """Read every limit that holds for this process; none where there are no control groups."""
    memory: list[GroupLimit] = []
    cpus: list[float] = []
    for version, controllers, directory in _directories(root):
        if version == 2:  # noqa: PLR2004
            memory += _memory_v2(directory)
            cpus += _cpus_v2(directory)
        if "memory" in controllers:
            memory += _memory_v1(directory)
        if "cpu" in controllers:
            cpus += _cpus_v1(directory)
    return GroupLimits(tuple(memory), min(cpus, default=None))


def _directories(root: Path) -> Iterator[tuple[int, frozenset[str], Path]]:
    """Yield each directory that limits this process, from its own group up to the mount."""
    groups = dict(_groups(_read(root / "proc/self/cgroup")))
    for mount in _mounts(root):
        names = [name for name in mount.controllers if name in groups]
        name = "" if mount.version == 2 else next(iter(names), None)  # noqa: PLR2004
        if name is None or name not in groups:
            continue
        for below in _ancestry(groups[name], mount.group_root):
            yield mount.version, mount.controllers, mount.directory / below


def _groups(text: str) -> Iterator[tuple[str, PurePosixPath]]:
    """Parse ``/proc/self/cgroup``: controller (empty for version 2) and group path."""
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        names, separator, path = rest.partition(":")
        if separator:
            for name in names.split(","):
                yield name, PurePosixPath(path)


def _mounts(root: Path) -> Iterator[_Mount]:
    """Parse ``/proc/self/mountinfo`` for control group mounts."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if len(left) < 5 or not right[0].startswith("cgroup"):  # noqa: PLR2004
            continue
        group_root, point = (_OCTAL.sub(lambda m: chr(int(m[1], 8)), text) for text in left[3:5])
        options = frozenset(right[-1].split(",")) & _V1_CONTROLLERS
        version = 2 if right[0] == "cgroup2" else 1
        controllers = options if version == 1 else frozenset[str]()
        yield _Mount(version, controllers, PurePosixPath(group_root), root / point.lstrip("/"))


def _ancestry(group: PurePosixPath, group_root: PurePosixPath) -> Iterator[str]:
    """Yield the group's path below the mount and all its parents; a path outside is the mount."""
    try:
        below = group.relative_to(group_root)
    except ValueError:
        below = PurePosixPath()
    if ".." in below.parts:
        below = PurePosixPath()
    yield str(below)
    for parent in below.parents:
        yield str(parent)


def _memory_v2(directory: Path) -> Iterator[GroupLimit]:
    limits = [_number(directory / name) for name in ("memory.max", "memory.high")]
    known = [limit for limit in limits if limit is not None]
    if known:
        used = _number(directory / "memory.current") or 0
        statistics = _statistics(directory / "memory.stat")
        dropped = statistics.get("inactive_file", 0) + statistics.get("active_file", 0)
        yield GroupLimit(min(known), max(0, used - dropped))


def _memory_v1(directory: Path) -> Iterator[GroupLimit]:
    statistics = _statistics(directory / "memory.stat")
    stated = (
        _number(directory / "memory.limit_in_bytes"),
        statistics.get("hierarchical_memory_limit"),
    )
    known = [limit for limit in stated if limit is not None and limit < _UNLIMITED_BYTES]
    if known:
        used = _number(directory / "memory.usage_in_bytes") or 0
        dropped = sum(statistics.get(f"total_{kind}_file", 0) for kind in ("inactive", "active"))
        yield GroupLimit(min(known), max(0, used - dropped))


def _cpus_v2(directory: Path) -> Iterator[float]:
    quota, _, period = _read(directory / "cpu.max").strip().partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        yield int(quota) / int(period)


def _cpus_v1(directory: Path) -> Iterator[float]:
    quota = _number(directory / "cpu.cfs_quota_us")
    period = _number(directory / "cpu.cfs_period_us")
    if quota is not None and period:
        yield quota / period


def _statistics(path: Path) -> dict[str, int]:
    pairs = (line.split(" ") for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}  # noqa: PLR2004


def _number(path: Path) -> int | None:
    """Read a number; None for ``max``, for ``-1`` and where there is no file."""
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
