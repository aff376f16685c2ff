"""One lock for each run, so that what shuts one run's intake keeps no other's waiting."""

from __future__ import annotations

import threading

from fedra_edge.protocol.ids import RunId


class RunLocks:
    """Held while a delta is counted in, and while a merge is made that may leave none behind."""

    def __init__(self) -> None:
        self._locks: dict[RunId, threading.Lock] = {}

    def of(self, run: RunId) -> threading.Lock:
        """Give the lock of a run, always the same."""
        return self._locks.setdefault(run, threading.Lock())
