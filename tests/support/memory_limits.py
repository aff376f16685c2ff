"""Runs fedra-edge in a process of its own, with little address space or inside a memory group."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
_PROGRAM: Final = """
import re, resource, runpy, sys
from pathlib import Path
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
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
    *arguments: str | Path, address_limit_bytes: int = 0, launcher: tuple[str, ...] = ()
) -> Ended:
    """Run a command of fedra-edge; an address limit of zero is none."""
    program = (sys.executable, "-c", _PROGRAM, str(address_limit_bytes))
    done = subprocess.run(
        [*launcher, *program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False, capture_output=True, encoding="utf-8", timeout=240,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)
