"""Shows on the board how far a transfer is, once it takes longer than a moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from fedra_edge.progress import ProgressBoard

OnBytes = Callable[[int], None]
"""Told of bytes that are there now; of fewer than none when some have to be fetched again."""
OpenMeter = Callable[[int], OnBytes]
"""Makes a listener for a transfer of so many bytes."""

_MOMENT_S: Final = 2.0
_EVERY_S: Final = 0.5


def unwatched(_size_bytes: int) -> None:
    """Tell nobody."""


def unmetered(_total_bytes: int) -> OnBytes:
    """Make a listener that tells nobody."""
    return unwatched


class Tally:
    """Passes bytes on and can take back what it passed on."""

    def __init__(self, on_bytes: OnBytes) -> None:
        self._on_bytes = on_bytes
        self._size_bytes = 0

    def __call__(self, size_bytes: int) -> None:
        """Take note of bytes."""
        self._size_bytes += size_bytes
        self._on_bytes(size_bytes)

    def take_back(self) -> None:
        """Undo it: they are not there, or will be counted once more."""
        self._on_bytes(-self._size_bytes)
        self._size_bytes = 0


class BoardMeter:
    """Counts one transfer, of any number of threads, and shows it under the present heading."""

    def __init__(
        self,
        board: ProgressBoard,
        total_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._board = board
        self._heading = board.current
        self._total_bytes = total_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._next_at = clock() + _MOMENT_S

    def __call__(self, size_bytes: int) -> None:
        """Take note of bytes; a lost connection that came between is forgotten with them."""
        with self._lock:
            self._done_bytes += size_bytes
            done_bytes, now = self._done_bytes, self._clock()
            if now < self._next_at:
                return
            self._next_at = now + _EVERY_S
        self._board.update(
            phase=self._heading.phase,
            detail=self._heading.detail,
            transfer_bytes_done=done_bytes,
            transfer_bytes_total=self._total_bytes,
        )
