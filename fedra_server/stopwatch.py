"""How often something was done in this process, and how long it took altogether."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measured by one thread, read by any."""

    def __init__(self) -> None:
        self.times = 0
        self.total_s = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure a block that ends well."""
        begun = time.perf_counter()
        yield
        self.total_s += time.perf_counter() - begun
        self.times += 1
