"""Repeats what an unreachable server made fail, with growing and jittered waits."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from fedra_edge.errors import ServerUnreachableError, WorkInterrupted

LOGGER: Final = logging.getLogger(__name__)
_MAX_OBEYED_S: Final = 300.0

Answer = TypeVar("Answer")
OnRetry = Callable[[ServerUnreachableError, float], None]


@dataclass(frozen=True)
class RetryPolicy:
    """How often to try in all (None: for ever) and how long to wait in between, in seconds."""

    max_attempts: int | None = None
    first_wait_s: float = 0.5
    max_wait_s: float = 10.0

    def wait_s(self, failures: int, jitter: float) -> float:
        """Give the wait after so many failures; ``jitter`` in 0..1 spreads clients over time."""
        ceiling = min(self.max_wait_s, self.first_wait_s * 2.0 ** min(failures - 1, 30))
        return ceiling * (0.5 + 0.5 * jitter)


ONCE: Final = RetryPolicy(max_attempts=1)
FEW_TIMES: Final = RetryPolicy(max_attempts=3)
FOR_EVER: Final = RetryPolicy()


class Retrier:
    """Runs an operation until it succeeds, fails for another reason, or a stop is asked for."""

    def __init__(self, stop: threading.Event, on_retry: OnRetry | None = None) -> None:
        self._stop = stop
        self._on_retry = on_retry
        self._generator = secrets.SystemRandom()

    def run(self, operation: Callable[[], Answer], policy: RetryPolicy) -> Answer:
        """Run the operation as often as the policy allows.

        Raises:
            ServerUnreachableError: The last attempt failed as well.
            WorkInterrupted: A stop was asked for while waiting.
        """
        failures = 0
        while True:
            if self._stop.is_set() and policy.max_attempts != 1:
                raise WorkInterrupted("a stop was asked for")
            try:
                return operation()
            except ServerUnreachableError as error:
                failures += 1
                if policy.max_attempts is not None and failures >= policy.max_attempts:
                    raise
                self._wait(error, policy.wait_s(failures, self._generator.random()))

    def _wait(self, error: ServerUnreachableError, wait_s: float) -> None:
        if error.retry_after_s is not None:
            wait_s = max(wait_s, min(error.retry_after_s, _MAX_OBEYED_S))
        if not self._stop.is_set():
            LOGGER.debug("trying again in %.1f s: %s", wait_s, error)
            if self._on_retry is not None:
                self._on_retry(error, wait_s)
        if self._stop.wait(wait_s):
            raise WorkInterrupted("a stop was asked for") from error
