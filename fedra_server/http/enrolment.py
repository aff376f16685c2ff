"""Limits how fast the population may grow, so that a loop of enrolments cannot flood the server."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from fedra_server.http.problems import NotNowError

_WINDOW_S: Final = 60.0


class EnrolmentPace:
    """Counts the enrolments of the last minute."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moments: deque[float] = deque()

    @contextmanager
    def enter(self, now: float, limit: int) -> Iterator[None]:
        """Count one more enrolment, unless the block refuses it.

        Raises:
            NotNowError: There were ``limit`` in the last minute.
        """
        with self._lock:
            while self._moments and self._moments[0] <= now - _WINDOW_S:
                self._moments.popleft()
            if len(self._moments) >= limit:
                raise NotNowError(
                    "too many machines are enrolling at once",
                    retry_after_s=max(1, int(self._moments[0] + _WINDOW_S - now)),
                )
            self._moments.append(now)
        try:
            yield
        except BaseException:
            with self._lock, suppress(ValueError):  # it may be a minute ago
                self._moments.remove(now)
            raise
