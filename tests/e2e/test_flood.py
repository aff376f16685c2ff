"""One member asks for all it can, over many connections: the others are served as before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.patience import percentile, staged

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="only there is every 127.* an own address"),
]

CONNECTIONS = 200
PARTICIPANTS = 20
MOST_S = 5.0
"""Generous for any machine; without limits nobody gets through at all."""


def test_a_flood_holds_up_nobody_else(tmp_path: Path) -> None:
    with staged(tmp_path, PARTICIPANTS) as stage, stage.flood(CONNECTIONS):
        waits = stage.measure(PARTICIPANTS)
    assert percentile(waits.all, 90) < MOST_S
    assert len(waits.all) == 3 * PARTICIPANTS
