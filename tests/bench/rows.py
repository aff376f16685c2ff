"""What a benchmark prints: rows that compare a figure with another of the same run."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class Row:
    """A measured value, what it is compared with, and the goal its ratio or value must meet."""

    what: str
    value: float
    unit: str
    against: str = ""
    ratio: float | None = None
    goal: str = ""
    holds: bool | None = None


def print_rows(bench: str, rows: Sequence[Row], packages: Sequence[str]) -> None:
    """Print one JSON object with ``--json``, else a table."""
    if "--json" in sys.argv[1:]:
        versions = {name: version(name) for name in packages}
        versions |= {"python": platform.python_version(), "machine": platform.machine()}
        told = {"bench": bench, "versions": versions, "rows": [asdict(row) for row in rows]}
        print(json.dumps(told))  # noqa: T201 - a program's output
        return
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:6.2f} x {row.against}"
        verdict = {True: "holds", False: "FAILS", None: ""}[row.holds]
        print(f"{row.what:58} {row.value:9.2f} {row.unit:4} {ratio:32} {row.goal:12} {verdict}")  # noqa: T201 - as above
