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
    """The machine's own clock."""

    def now(self) -> float:
        """Give the present moment."""
        return time.time()
