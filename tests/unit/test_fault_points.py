"""A fault point costs nothing until it is named, and then kills at exactly the visit asked for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedra_edge.protocol.fault_points import FAULT_POINTS, FAULT_VARIABLE

ROOT = Path(__file__).parents[2]
VISITS = """
from fedra_edge.protocol.fault_points import fault_point
for number in range(3):
    print(number, flush=True)
    fault_point("merge.piece")
"""


def visit(named: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, FAULT_VARIABLE: named}
    return subprocess.run(
        [sys.executable, "-c", VISITS],
        check=False, capture_output=True, encoding="utf-8", env=environment, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("named", "visits"), [("", 3), ("publish.decided", 3), ("merge.piece", 1), ("merge.piece:2", 2)]
)
def test_the_process_ends_at_the_visit_that_is_named(named: str, visits: int) -> None:
    done = visit(named)
    assert len(done.stdout.split()) == visits
    assert done.returncode == (0 if visits == 3 else -signal.SIGKILL)


@pytest.mark.parametrize("named", ["merge", "merge.piece:0", "merge.piece:x", "merge.piece:"])
def test_a_name_that_is_none_ends_the_process_at_its_start(named: str) -> None:
    done = visit(named)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "merge.piece" in done.stderr


def test_every_point_is_somewhere_in_the_sources() -> None:
    sources = [*ROOT.glob("fedra_edge/**/*.py"), *ROOT.glob("fedra_server/**/*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert set(re.findall(r'fault_point\("([^"]+)"\)', text)) == FAULT_POINTS
