"""Whatever is killed at whatever moment, each delta counts once and every revision adds up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.soak.soaking import Soak
from tests.support.federation import running_federation

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SECONDS = 25.0


def test_nothing_is_lost_while_everything_is_killed(prepared_home: Path, tmp_path: Path) -> None:
    with running_federation(tmp_path / "server", prepared_home) as federation:
        soak = Soak(federation, np.random.default_rng(5))
        soak.begin(tmp_path)
        soak.shake(SECONDS)
        report = soak.settle()
        assert report.is_clean, report
        assert soak.lost() == []
        assert soak.kills["server"] > 0
        assert soak.merged() > len(soak.runs)
