"""Descriptors and connections: what fits, and how rarely it is told."""

from __future__ import annotations

import asyncio
import errno
import logging
import sys

import pytest

from fedra_server.http.connections import (
    Throttle,
    most_connections,
    tell_rarely_of_failed_accepts,
)


def test_once_in_a_while_is_once_in_a_while() -> None:
    throttle = Throttle(10.0)
    assert [throttle.admits(now) for now in (0.0, 9.0, 10.0, 19.0, 21.0)] == [
        True, False, True, False, True,
    ]  # fmt: skip


def test_a_small_population_needs_few_connections(caplog: pytest.LogCaptureFixture) -> None:
    assert 2 <= most_connections(1) <= 200
    assert not caplog.records


@pytest.mark.skipif(sys.platform == "win32", reason="sockets are no descriptors there")
def test_connections_fit_below_the_limit_of_open_files(caplog: pytest.LogCaptureFixture) -> None:
    import resource

    fitting = most_connections(10**9)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard
    assert 2 * fitting < soft
    assert "ulimit -n" in caplog.text


def test_failed_accepts_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    try:
        tell_rarely_of_failed_accepts(loop)
        for _ in range(100):
            error = OSError(errno.EMFILE, "Too many open files")
            message = "socket.accept() out of system resource"
            loop.call_exception_handler({"message": message, "exception": error})
        assert len(caplog.records) == 1
        loop.call_exception_handler({"message": "another", "exception": ValueError()})
    finally:
        loop.close()
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
