"""Bounds the open connections: fewer than the system allows, and none that asks for nothing."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import Any, ClassVar, Final

import h11
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

MAX_HEAD_S: Final = 15.0
"""How long a connection may take until the head of its first, or next, request is complete."""

_PER_CLIENT: Final = 2
"""Connections of a client: one waits for work, another may send a heartbeat or a delta."""
_PER_CONNECTION: Final = 2
"""Descriptors of a connection: its socket, and the file that it fetches or sends."""
_OTHER_CONNECTIONS: Final = 128
"""For operators, probes and clients that enrol."""
_RESERVED: Final = 160
"""Descriptors for the database, logs, merging, and connections just accepted."""
_FEWEST: Final = 16
_TOLD_AGAIN_S: Final = 60.0


def most_connections(max_clients: int) -> int:
    """Tell how many connections may be open; the limit of open files is raised before."""
    wanted = _PER_CLIENT * max_clients + _OTHER_CONNECTIONS
    descriptors = _raise_descriptor_limit(_PER_CONNECTION * wanted + _RESERVED)
    fitting = max(_FEWEST, (descriptors - _RESERVED) // _PER_CONNECTION)
    if fitting < max_clients:
        logger.warning(
            "the limit of %d open files is enough for %d connections; for max_clients = %d raise "
            "it to %d ('ulimit -n', or LimitNOFILE= of a systemd unit)",
            descriptors, fitting, max_clients, _PER_CONNECTION * max_clients + _RESERVED,
        )  # fmt: skip
    return min(wanted, fitting)


class Throttle:
    """Lets something happen once in a while."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next_at = float("-inf")

    def admits(self, now: float) -> bool:
        """Tell whether the interval has passed since the last time this was true."""
        if now < self._next_at:
            return False
        self._next_at = now + self._interval_s
        return True


class BoundedProtocol(H11Protocol):
    """A connection that is turned away when there are too many, and closed when it asks nothing.

    uvicorn's own ``limit_concurrency`` counts only connections that have sent a request.
    """

    _telling: ClassVar = Throttle(_TOLD_AGAIN_S)
    _overdue: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self._turn_away()
        else:
            self._expect_head()

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # a part of a head at most
            self._expect_head()
        else:
            self._stop_expecting()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._overdue is None:
            self._overdue = self.loop.call_later(MAX_HEAD_S, self.timeout_keep_alive_handler)

    def _stop_expecting(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _turn_away(self) -> None:
        """Answer and close at once, so that the descriptor is free for others."""
        self.connections.discard(self)
        if self._telling.admits(time.monotonic()):
            logger.warning("turning connections away: %d are open already", len(self.connections))
        self.transport.write(
            b"HTTP/1.1 503 Service Unavailable\r\n"
            b"Retry-After: 10\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        self.transport.close()


def tell_rarely_of_failed_accepts(loop: asyncio.AbstractEventLoop) -> None:
    """Let a loop tell once in a while, not for each try, that it cannot accept connections."""
    telling = Throttle(_TOLD_AGAIN_S)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        is_accepting = str(context.get("message", "")).startswith("socket.accept()")
        if not is_accepting:
            loop.default_exception_handler(context)
        elif telling.admits(time.monotonic()):
            logger.error("cannot accept connections: %s", context.get("exception"))

    loop.set_exception_handler(handle)


def _raise_descriptor_limit(wanted: int) -> int:
    """Raise the limit of open files as far as this process may; tell what it is then."""
    if sys.platform == "win32":  # sockets are no descriptors there
        return sys.maxsize
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    raised = max(soft, wanted) if hard == resource.RLIM_INFINITY else hard
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError):  # some systems have a further limit that cannot be asked for
        return soft
    return raised
