"""Limits how often a client changes its key: each change is kept in the journal for ever."""

from __future__ import annotations

import math
import threading
from typing import Final

from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.http.pacing import Buckets, Rate
from fedra_server.http.problems import RefusedWithHeadersError

MOST_AN_HOUR: Final = 10


class KeyChangePace:
    """Counts the changes of each client's key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changes: Buckets[ClientId] = Buckets(Rate(MOST_AN_HOUR / 3600, MOST_AN_HOUR))

    def enter(self, client_id: ClientId, now: float) -> None:
        """Count one more change.

        Raises:
            RefusedWithHeadersError: There were too many lately.
        """
        with self._lock:
            wait_s = self._changes.take(client_id, now)
        if wait_s:
            raise RefusedWithHeadersError(
                ProblemCode.TOO_MANY_REQUESTS,
                f"a client changes its key {MOST_AN_HOUR} times an hour at most",
                {"Retry-After": str(math.ceil(wait_s))},
            )
