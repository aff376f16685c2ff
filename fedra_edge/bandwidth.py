"""A cap on what all transfers of a client together take of its link, in both directions."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

_PORTION_BYTES: Final = 256 * 2**10
_LEAST_PORTION_BYTES: Final = 2**10
_PORTIONS_PER_S: Final = 4


class Bandwidth:
    """Counts bytes that crossed the link and makes transfers wait while too many did.

    A token bucket that holds nothing: what was not used is not saved up, and a portion that was
    more than there was room for is waited for afterwards.
    """

    def __init__(
        self, max_bytes_per_s: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes_per_s = max_bytes_per_s
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at = clock()

    @property
    def portion_bytes(self) -> int:
        """How much to send at once: under a low cap little, so that a transfer never seems dead."""
        if self._max_bytes_per_s is None:
            return _PORTION_BYTES
        quarter = self._max_bytes_per_s // _PORTIONS_PER_S
        return min(_PORTION_BYTES, max(_LEAST_PORTION_BYTES, quarter))

    def spend(self, size_bytes: int) -> None:
        """Take note of bytes that crossed the link."""
        if self._max_bytes_per_s is not None:
            with self._lock:
                start = max(self._free_at, self._clock())
                self._free_at = start + size_bytes / self._max_bytes_per_s

    def wait(self, stop: threading.Event) -> None:
        """Wait until the link may be used again, or a stop is asked for."""
        while self._max_bytes_per_s is not None:
            with self._lock:
                wait_s = self._free_at - self._clock()
            if wait_s <= 0 or stop.wait(wait_s):
                return
