"""Time as an argument, so that rules about time can be tested without waiting."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since the epoch."""

    def now(self) -> float:
        """Give the present moment."""
        ...


class SystemClock:
    """The machine's clock as it stood when this was made, and evenly on from there.

    Setting the machine's clock then ends no deadline and silences no client; it is heeded by the
    next process.
    """

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def now(self) -> float:
        """Give the present moment."""
        return self._offset_s + time.monotonic()
