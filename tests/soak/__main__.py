"""Kills server and clients at random for some minutes and checks that nothing was lost.

``python -m tests.soak [--minutes 3] [--seed 0]``
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.soak.soaking import Soak
from tests.support.federation import prepare_home, running_federation


def main() -> int:
    """Soak, print what happened as one JSON object, and fail when a rule is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        with running_federation(place / "server", prepare_home(place)) as federation:
            soak = Soak(federation, np.random.default_rng(chosen.seed))
            soak.begin(place)
            soak.shake(chosen.minutes * 60)
            report = soak.settle()
            told = {
                "seed": chosen.seed,
                "kills": dict(soak.kills),
                "merged_deltas": soak.merged(),
                "damaged_at_clients": soak.lost(),
                "audit": report.model_dump(mode="json"),
            }
    is_good = report.is_clean and not told["damaged_at_clients"]
    print(json.dumps(told, indent=2))  # noqa: T201 - a program's output
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
