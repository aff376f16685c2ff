"""A wrong clock for real processes: Python's time is off by the seconds that a file says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_SHIFTED = """
import time
from pathlib import Path

right, right_ns = time.time, time.time_ns

def wrong_by():
    return int(Path({file!r}).read_text())

time.time = lambda: right() + wrong_by()
time.time_ns = lambda: right_ns() + wrong_by() * 10**9
"""


class WrongClock:
    """A clock that can be set while processes look at it; ``variables`` make them do so."""

    def __init__(self, directory: Path, wrong_by_s: int = 0) -> None:
        directory.mkdir(parents=True)
        self._file = directory / "wrong_by_s"
        self.set(wrong_by_s)
        shifted = _SHIFTED.format(file=str(self._file))
        (directory / "sitecustomize.py").write_text(shifted, encoding="utf-8")
        self.variables: Mapping[str, str] = {"PYTHONPATH": f"{directory}:{_ROOT}"}

    def set(self, wrong_by_s: int) -> None:
        """Set the clock, as a time service does; nobody ever sees half of it."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(str(wrong_by_s), encoding="utf-8")
        fresh.replace(self._file)
