"""Challenges that nobody needs to remember: the server knows its own, and takes each one once."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from typing import Final

from fedra_edge.protocol.problems import ProblemCode
from fedra_server.errors import RefusedError
from fedra_server.http.problems import NotNowError

LIFETIME_S: Final = 60.0
_MOST_USED: Final = 50_000
"""Challenges taken within their lifetime, all of them by members; a few megabytes."""
_PARTS: Final = 3


class Challenges:
    """Draws challenges and takes them back; only those taken are remembered, until they expire."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()

    def draw(self, now: float) -> str:
        """Give a new challenge."""
        body = f"{int((now + LIFETIME_S) * 1000):x}.{secrets.token_hex(16)}"
        return f"{body}.{self._seal(body)}"

    def check(self, challenge: str, now: float) -> None:
        """Make sure that a challenge is one of ours and fresh.

        Raises:
            RefusedError: It is not.
        """
        body, _, seal = challenge.rpartition(".")
        if not hmac.compare_digest(self._seal(body), seal):
            raise _refused("this server did not give this challenge")
        if int(body.partition(".")[0], 16) <= now * 1000:
            raise _refused("the challenge has expired")

    def take(self, challenge: str, now: float) -> None:
        """Use a challenge that was checked; nobody can use it again.

        Raises:
            RefusedError: It was used before.
            NotNowError: There were too many in the last minute.
        """
        with self._lock:
            self._forget_expired(now)
            if challenge in self._used:
                raise _refused("the challenge was used before")
            if len(self._used) >= _MOST_USED:
                raise NotNowError("too many machines sign in at once", retry_after_s=5)
            self._used[challenge] = now

    def _forget_expired(self, now: float) -> None:
        """Forget those that were taken so long ago that they have expired since."""
        while self._used:
            oldest = next(iter(self._used))
            if now - self._used[oldest] <= LIFETIME_S:
                return
            del self._used[oldest]

    def _seal(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), hashlib.sha256).hexdigest()


def _refused(message: str) -> RefusedError:
    return RefusedError(ProblemCode.CHALLENGE_INVALID, message)
