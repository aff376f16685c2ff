"""Runs fedra-edge in a process of its own with little memory: an address limit or a group's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
_GROUPS: Final = Path("/sys/fs/cgroup")
_PROGRAM: Final = """
import re, resource, runpy, sys
from pathlib import Path
address_limit, *group = sys.argv.pop(1).split(":", 1)
if group:
    Path(group[0]).write_text("0")  # 0 is this process
if int(address_limit):
    resource.setrlimit(resource.RLIMIT_AS, (int(address_limit), int(address_limit)))
try:
    runpy.run_module("fedra_edge", run_name="__main__", alter_sys=True)
finally:
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmPeak:\\s+(\\d+)", status)[1]) * 1024, file=sys.stderr)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended, and how much of its address space it used."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def address_peak_bytes(self) -> int:
        return int(self.stderr.splitlines()[-1])


def run_limited(
    *arguments: str | Path, address_limit_bytes: int = 0, group: Path | None = None
) -> Ended:
    """Run a command of fedra-edge; zero is no limit."""
    limits = str(address_limit_bytes) if group is None else f"{address_limit_bytes}:{group}"
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, limits, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False, capture_output=True, encoding="utf-8", timeout=240,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """Make a control group; what a process writes itself into is given. Skips where none can be."""
    version_1 = _GROUPS / "memory"
    parent, limit = (
        (version_1, "memory.limit_in_bytes") if version_1.is_dir() else (_GROUPS, "memory.max")
    )
    group = parent / f"fedra-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not (group / limit).exists():
            pytest.skip("control groups here do not limit memory")
        (group / limit).write_text(str(limit_bytes), encoding="ascii")
        yield group / "cgroup.procs"
    finally:
        group.rmdir()
