"""Memory control groups for tests, Linux versions 1 and 2: made, resized, watched and removed."""

from __future__ import annotations

import errno
import itertools
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.support.edges import wait_until

_MOUNT: Final = Path("/sys/fs/cgroup")
_VERSION_1: Final = _MOUNT / "memory"
_NUMBERS: Final = itertools.count()
_ENTER: Final = 'echo $$ >"$0" && exec "$@"'


@dataclass(frozen=True)
class MemoryGroup:
    """A control group; who goes beyond its limit is killed by the system."""

    directory: Path
    is_version_1: bool

    @property
    def entrance(self) -> Path:
        """The file that a process writes its number into to become a member."""
        return self.directory / "cgroup.procs"

    @property
    def launcher(self) -> tuple[str, ...]:
        """What to put before a command, so that it is a member from its first instruction on."""
        return ("sh", "-c", _ENTER, str(self.entrance))

    @property
    def members(self) -> list[int]:
        """The numbers of the processes in it."""
        return [int(line) for line in self.entrance.read_text(encoding="ascii").split()]

    @property
    def used_bytes(self) -> int:
        """What its members occupy, files that the system keeps for them included."""
        name = "memory.usage_in_bytes" if self.is_version_1 else "memory.current"
        return int((self.directory / name).read_text(encoding="ascii"))

    @property
    def kills(self) -> int:
        """How many members the system has killed for want of memory."""
        name = "memory.oom_control" if self.is_version_1 else "memory.events"
        match = re.search(r"^oom_kill (\d+)", (self.directory / name).read_text(), re.MULTILINE)
        assert match is not None
        return int(match[1])

    def try_limit(self, limit_bytes: int) -> bool:
        """Set the limit; false when the members occupy more and nothing can be dropped.

        Version 2 takes any limit and kills instead, so there a lower one is not tried then.
        """
        if not self.is_version_1:
            if self.used_bytes > limit_bytes:
                return False
            self._write("memory.max", limit_bytes)
            return True
        try:
            self._write("memory.limit_in_bytes", limit_bytes)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise
        return True

    def forbid_swap(self) -> None:
        """Let the limit hold for memory and swap together, where the system knows swap."""
        if not self.is_version_1:
            if (self.directory / "memory.swap.max").exists():
                self._write("memory.swap.max", 0)
        elif (self.directory / "memory.swappiness").exists():
            self._write("memory.swappiness", 0)

    def _write(self, name: str, number: int) -> None:
        (self.directory / name).write_text(str(number), encoding="ascii")


@contextmanager
def limited_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Have a group for the length of a block; skips the test where none can be made."""
    problem = why_no_groups()
    if problem:
        pytest.skip(problem)
    with _group() as group:
        group.forbid_swap()
        assert group.try_limit(limit_bytes)
        yield group


def why_no_groups() -> str:
    """Say why no group can be made here; nothing when it can."""
    try:
        with _group() as group:
            name = "memory.limit_in_bytes" if group.is_version_1 else "memory.max"
            limits_memory = (group.directory / name).exists()
    except OSError as error:
        return f"no control group can be made here: {error}"
    return "" if limits_memory else "control groups here do not limit memory"


@contextmanager
def _group() -> Iterator[MemoryGroup]:
    is_version_1 = _VERSION_1.is_dir()
    parent = _VERSION_1 if is_version_1 else _MOUNT
    directory = parent / f"fedra-test-{os.getpid()}-{next(_NUMBERS)}"
    directory.mkdir()
    group = MemoryGroup(directory, is_version_1)
    try:
        yield group
    finally:
        for member in group.members:  # there are some when a test failed
            os.kill(member, signal.SIGKILL)
        wait_until("an empty group", lambda: not group.members)
        directory.rmdir()
