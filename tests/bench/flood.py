"""What others feel of a client that asks for all it can: a real server, real processes.

Every figure is the time that an honest client waits for an answer, over loopback, while the
flood's process takes a processor of its own. ``python -m tests.bench.flood [--json]``
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.bench.rows import Row, print_rows
from tests.support.patience import Waits, percentile, staged

_MEASURED = 60
_FLOODS = (16, 200, 1000)
_MILLISECONDS = 1e3
_GOAL_MS = 500.0
"""What 95 of 100 calls of others may take during a flood."""


def main() -> None:
    """Measure quiet first, then one flood after the other, each on a server of its own."""
    with tempfile.TemporaryDirectory() as directory:
        with staged(Path(directory), _MEASURED) as stage:
            quiet = stage.measure(_MEASURED)
        rows = [*_rows("quiet", quiet, quiet)]
        for connections in _FLOODS:
            with (
                staged(Path(directory) / str(connections), _MEASURED) as stage,
                stage.flood(connections),
            ):
                rows += _rows(f"{connections} connections", stage.measure(_MEASURED), quiet)
    print_rows("flood", rows, ["uvicorn", "fastapi", "sqlalchemy"])


def _rows(what: str, waits: Waits, quiet: Waits) -> list[Row]:
    kinds = {"heartbeat": "heartbeats", "poll": "polls", "delta": "uploads"}
    rows = []
    for kind, name in kinds.items():
        value, base = (percentile(getattr(it, name), 95) * _MILLISECONDS for it in (waits, quiet))
        told = f"{what}: a {kind}, 95 of 100 within"
        is_flood = waits is not quiet
        goal, holds = (f"<= {_GOAL_MS:g} ms", value <= _GOAL_MS) if is_flood else ("", None)
        rows.append(Row(told, value, "ms", "quiet", value / base, goal, holds))
    longest_ms = max(waits.all) * _MILLISECONDS
    rows.append(Row(f"{what}: the longest of all", longest_ms, "ms"))
    return rows


if __name__ == "__main__":
    main()
