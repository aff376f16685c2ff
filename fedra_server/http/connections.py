"""Bounds the open connections: fewer than the system allows, and none that asks for nothing."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import sys
import time
from collections import Counter
from http import HTTPStatus
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

import h11
from fastapi import Response
from typing_extensions import override
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fedra_edge.protocol.problems import ProblemCode
from fedra_server.http.fairness import network_of
from fedra_server.http.pacing import Buckets, Rate
from fedra_server.http.problems import problem_response

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
_SHARE: Final = 0.75
"""The part of all connections that one address may have; a site may be many clients."""
_OPENED_PER_REQUEST: Final = 2.0
_BURST_S: Final = 10.0
_LONGEST_HOLD_S: Final = 10.0
_LINGER_S: Final = 2.0
_PEERS: Final = logging.getLogger(f"{__name__}.peers")
"""Where uvicorn complains of what peers send; nobody should be able to fill the disk with it."""
_PEERS.setLevel(logging.ERROR)


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


class ConnectionShares:
    """The connections of each address, of those that one server has open.

    An address may open twice as many as it may send requests without a known credential.
    """

    def __init__(self, config: Config, strange_requests_per_s: float) -> None:
        trusted = config.forwarded_allow_ips if config.proxy_headers else []
        self._proxies = [ipaddress.ip_network(it, strict=False) for it in trusted]
        self._most = int(_SHARE * (config.limit_concurrency or sys.maxsize))
        self._open: Counter[str] = Counter()
        per_s = _OPENED_PER_REQUEST * strange_requests_per_s
        self._opened: Buckets[str] = Buckets(Rate(per_s, per_s * _BURST_S))

    def enter(self, host: str, now: float) -> float | None:
        """Count a new connection; tell when to listen to it, in seconds. Proxies have no limit.

        Returns:
            None when its address has too many.
        """
        name = network_of(host)
        self._open[name] += 1
        if self._is_proxy(host):
            return 0.0
        if self._open[name] > self._most:
            return None
        return self._opened.reserve(name, now, _LONGEST_HOLD_S)

    def leave(self, host: str) -> None:
        """Count a connection no longer."""
        name = network_of(host)
        self._open[name] -= 1
        if self._open[name] <= 0:
            del self._open[name]

    def _is_proxy(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self._proxies)


class BoundedProtocol(H11Protocol):
    """A connection that is turned away when there are too many, and closed when it asks nothing.

    uvicorn's own ``limit_concurrency`` counts only connections that have sent a request.
    """

    _telling: ClassVar = Throttle(_TOLD_AGAIN_S)
    _shares: ClassVar[WeakKeyDictionary[ServerState, ConnectionShares]] = WeakKeyDictionary()
    _overdue: asyncio.TimerHandle | None = None
    _host = ""
    _is_refused = False

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        super().connection_made(transport)
        self.logger = _PEERS
        self._host = self.client[0] if self.client else ""
        if self.server_state not in self._shares:
            limits = self.config.app.state.services.config  # type: ignore[union-attr]  # ours
            shares = ConnectionShares(self.config, limits.max_strange_requests_per_s)
            self._shares[self.server_state] = shares
        hold_s = self._shares[self.server_state].enter(self._host, self.loop.time())
        is_full = self.limit_concurrency is not None and (
            len(self.connections) >= self.limit_concurrency
        )
        if is_full or hold_s is None:
            self._turn_away()
        elif hold_s:
            transport.pause_reading()
            self.loop.call_later(hold_s, self._listen)
        else:
            self._expect_head()

    @override
    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # a part of a head at most
            self._expect_head()
        else:
            self._stop_expecting()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._shares[self.server_state].leave(self._host)
        self._stop_expecting()
        super().connection_lost(exc)

    @override
    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP with a problem document; it must be read before we close."""
        hint = getattr(sys.exception(), "error_status_hint", 0)
        is_too_large = hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        code = ProblemCode.HEAD_TOO_LARGE if is_too_large else ProblemCode.HTTP_MALFORMED
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.write(
                _as_http(problem_response(code, "this cannot be read as HTTP/1.1"))
            )
        self._is_refused = True
        self._stop_expecting()
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(_LINGER_S, self.transport.close)
        else:
            self.transport.close()

    def _listen(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()
            self._expect_head()

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


def _as_http(response: Response) -> bytes:
    """Write an answer that ends its connection."""
    status = HTTPStatus(response.status_code)
    lines = [f"HTTP/1.1 {status} {status.phrase}".encode(), b"connection: close"]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


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
