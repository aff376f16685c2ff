"""The server's clock goes on evenly, whatever the machine's is set to."""

from __future__ import annotations

import time

import pytest

from fedra_server.clock import SystemClock

HOURS_S = 5 * 3600


@pytest.mark.parametrize("jump_s", [HOURS_S, -HOURS_S])
def test_setting_the_machines_clock_is_heeded_by_the_next_process_only(
    monkeypatch: pytest.MonkeyPatch, jump_s: int
) -> None:
    clock, right = SystemClock(), time.time
    assert abs(clock.now() - right()) < HOURS_S / 2
    monkeypatch.setattr(time, "time", lambda: right() + jump_s)
    assert abs(clock.now() - right()) < HOURS_S / 2
    assert abs(SystemClock().now() - right() - jump_s) < HOURS_S / 2


def test_it_never_goes_back() -> None:
    clock = SystemClock()
    moments = [clock.now() for _ in range(1000)]
    assert moments == sorted(moments)
