"""Measures what this process occupies, now and at its highest since a moment of our choice."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

_STATUS: Final = Path("/proc/self/status")
_CLEAR_REFS: Final = Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"
"""Makes Linux start the high-water mark anew (proc(5), /proc/pid/clear_refs)."""

_SAMPLE_S: Final = 0.002


class PeakMeter:
    """A running measurement; ``peak_bytes`` may be read while and after it runs."""

    def __init__(self) -> None:
        self._highest_bytes = resident_bytes()
        self._has_high_water_mark = _reset_high_water_mark()

    @property
    def peak_bytes(self) -> int:
        """The most that the whole process occupied since the start."""
        if self._has_high_water_mark:
            self.note(_high_water_mark())
        return self._highest_bytes

    def note(self, occupied_bytes: int) -> None:
        """Take account of a sample."""
        self._highest_bytes = max(self._highest_bytes, occupied_bytes)

    def sample_until(self, ended: threading.Event) -> None:
        """Take samples where the system keeps no mark that could be reset."""
        while not self._has_high_water_mark and not ended.wait(_SAMPLE_S):
            self.note(resident_bytes())


@contextmanager
def measured_peak() -> Iterator[PeakMeter]:
    """Measure the peak while the context is open; measurements do not nest."""
    meter = PeakMeter()
    ended = threading.Event()
    sampler = threading.Thread(target=meter.sample_until, args=(ended,), name="memory-meter")
    sampler.start()
    try:
        yield meter
        meter.note(meter.peak_bytes)
    finally:
        ended.set()
        sampler.join()


def resident_bytes() -> int:
    """Give what this process occupies now."""
    return psutil.Process().memory_info().rss


def unshared_bytes() -> int:
    """Give what this process occupies apart from mapped files, where the system tells those."""
    own = psutil.Process().memory_info()
    return int(own.rss - getattr(own, "shared", 0))


def _reset_high_water_mark() -> bool:
    if sys.platform != "linux":
        return False
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    match = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return int(match[1]) * 1024 if match is not None else 0
