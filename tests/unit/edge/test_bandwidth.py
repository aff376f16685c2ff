"""The cap holds over all transfers together, is not saved up, and never holds a stop up."""

from __future__ import annotations

import threading

import pytest
from typing_extensions import override

from fedra_edge.bandwidth import Bandwidth


class Hours:
    """A clock that stands still, and a stop event on which waiting takes time of that clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.stop = _WaitingMoves(self)

    def __call__(self) -> float:
        return self.now


class _WaitingMoves(threading.Event):
    def __init__(self, clock: Hours) -> None:
        super().__init__()
        self._clock = clock

    @override
    def wait(self, timeout: float | None = None) -> bool:
        """Let the clock go on, unless the event is set."""
        if not self.is_set():
            self._clock.now += timeout or 0.0
        return self.is_set()


def test_a_transfer_takes_as_long_as_the_cap_says() -> None:
    clock = Hours()
    bandwidth = Bandwidth(1000, clock)
    for _ in range(10):
        bandwidth.wait(clock.stop)
        bandwidth.spend(500)
    bandwidth.wait(clock.stop)
    assert clock.now == pytest.approx(1005.0)


def test_what_was_not_used_is_not_saved_up() -> None:
    clock = Hours()
    bandwidth = Bandwidth(1000, clock)
    clock.now += 3600
    bandwidth.spend(5000)
    bandwidth.wait(clock.stop)
    assert clock.now == pytest.approx(4605.0)


def test_a_stop_ends_a_wait() -> None:
    clock = Hours()
    bandwidth = Bandwidth(1000, clock)
    bandwidth.spend(10**9)
    clock.stop.set()
    bandwidth.wait(clock.stop)
    assert clock.now == 1000.0


def test_without_a_cap_nobody_waits() -> None:
    clock = Hours()
    bandwidth = Bandwidth(None, clock)
    bandwidth.spend(10**12)
    bandwidth.wait(clock.stop)
    assert clock.now == 1000.0


@pytest.mark.parametrize(
    ("max_bytes_per_s", "portion_bytes"),
    [(None, 262_144), (10**9, 262_144), (8192, 2048), (1000, 1024)],
)
def test_a_low_cap_is_spent_in_small_portions(
    max_bytes_per_s: int | None, portion_bytes: int
) -> None:
    assert Bandwidth(max_bytes_per_s).portion_bytes == portion_bytes
