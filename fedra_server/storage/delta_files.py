"""The files of admitted deltas; what was digested as it came is not read again for that at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from fedra_edge.protocol.files import sha256_of_file
from fedra_edge.protocol.ids import AssignmentId
from fedra_server.config import ServerHome
from fedra_server.storage.durability import replace_durably

_TRUSTED_S: Final = 60.0
"""For so long the system still has the bytes in memory: reading them would not ask the disk."""
_MOST_NOTED: Final = 1024


class _Noted(NamedTuple):
    sha256: str
    stamp: tuple[int, int, int]
    at: float


class DeltaFiles:
    """A file per admitted delta, named by its assignment.

    The digest that one was kept with holds for a minute, unless anybody has written to the file
    or moved it, which changes its stamp.
    """

    def __init__(self, home: ServerHome, clock: Callable[[], float] = time.monotonic) -> None:
        self._home = home
        self._clock = clock
        self._noted: dict[AssignmentId, _Noted] = {}
        self._lock = threading.Lock()

    def path(self, assignment_id: AssignmentId) -> Path:
        """Name the file of a delta."""
        return self._home.delta_file(assignment_id)

    def keep(self, part: Path, assignment_id: AssignmentId, sha256: str) -> None:
        """Give a synced file that was just digested its place, in a way that lasts.

        Raises:
            OSError: The disk refused.
        """
        path = self.path(assignment_id)
        replace_durably(part, path)
        noted = _Noted(sha256, _stamp(path), self._clock())
        with self._lock:
            while len(self._noted) >= _MOST_NOTED:
                del self._noted[next(iter(self._noted))]
            self._noted[assignment_id] = noted

    def sha256(self, assignment_id: AssignmentId) -> str:
        """Give the digest of a delta's file as it is now.

        Raises:
            OSError: The file is not there, or cannot be read.
        """
        path = self.path(assignment_id)
        stamp = _stamp(path)
        with self._lock:
            noted = self._noted.pop(assignment_id, None)
        if noted is not None and noted.stamp == stamp and self._clock() - noted.at < _TRUSTED_S:
            return noted.sha256
        return sha256_of_file(path)


def _stamp(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_ctime_ns
