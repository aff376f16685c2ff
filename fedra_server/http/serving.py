"""Runs a server until it is told to stop: home, coordinator, sockets, signals, clean end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, cast

import uvicorn
from pydantic import JsonValue
from typing_extensions import override

from fedra_edge.protocol.version import PROTOCOL_VERSION
from fedra_server import __version__
from fedra_server.addressing import (
    check_exposure,
    is_loopback,
    is_secured,
    site_address,
    url_of,
)
from fedra_server.authority import ensure_authority
from fedra_server.chain import SERVER, Event
from fedra_server.clock import SystemClock
from fedra_server.config import ServerConfig, ServerHome, harmless_settings
from fedra_server.coordinator import Coordinator
from fedra_server.errors import ConfigurationError, StorageFullError
from fedra_server.http.app import create_app
from fedra_server.http.connections import (
    BoundedProtocol,
    most_connections,
    tell_rarely_of_failed_accepts,
)
from fedra_server.http.discarding import discard_dead_uploads
from fedra_server.http.heap import share_heaps, tidy_heap
from fedra_server.http.home_lock import sole_server
from fedra_server.http.plainness import MAX_HEAD_BYTES
from fedra_server.http.securing import Doors, ServerTls
from fedra_server.http.services import Services
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.collecting import Collector
from fedra_server.storage.durability import disk_errors, write_durably
from fedra_server.storage.quotas import DiskQuota
from fedra_server.storage.store import Store

logger = logging.getLogger(__name__)

_BACKLOG: Final = 2048
"""Connections that wait in the system until they are accepted."""
_ACCEPTS_AT_ONCE: Final = 64
"""asyncio's backlog: it tries that many accepts in a row, even when every one of them fails."""
_KEEP_ALIVE_S: Final = 75
_GRACE_S: Final = 3
_SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
)


def serve(home: ServerHome, config: ServerConfig) -> int:
    """Serve a home until SIGINT or SIGTERM; give the exit code of a clean stop, 0.

    Raises:
        ConfigurationError: The address is taken, the home is served already, or a setting
            cannot work.
        StorageError: Disk or database refused.
    """
    check_exposure(config)
    home.create()
    share_heaps()
    with ExitStack() as stack:
        stack.enter_context(sole_server(home))
        listener = stack.enter_context(listen(config.host, config.port))
        store = Store.open(home.path, config.database_url)
        stack.callback(store.close)
        services = build_services(home, config, store)
        _note_start(store, config)
        collector = Collector(store, services.blobs, home, services.clock)
        collector.restore()
        discard_dead_uploads(services)
        stack.enter_context(collector.at_work())
        services.coordinator.start()
        stack.callback(services.coordinator.stop)
        tls = ServerTls(home, config) if is_secured(config) else None
        if tls is None and not is_loopback(config.host):
            logger.warning("connections to %s are not secured: tls = 'off'", config.host)
        stack.callback(home.server_file.unlink, missing_ok=True)
        server = GracefulServer(services, lambda: _announce(home, config, listener), tls)
        tidy_heap()
        server.run(sockets=[listener])
    logger.info("stopped")
    return 0


def _note_start(store: Store, config: ServerConfig) -> None:
    """Write into the journal that a server starts; a full disk does not keep it from starting."""
    details: dict[str, JsonValue] = {"version": __version__, "settings": harmless_settings(config)}
    try:
        store.note(Event.SERVER_STARTED, "server", details, by=SERVER)
    except StorageFullError as error:
        logger.warning("the journal does not tell of this start: %s", error)


def build_services(home: ServerHome, config: ServerConfig, store: Store) -> Services:
    """Put the parts of a server together; the coordinator is not started yet."""
    clock = SystemClock()
    blobs = BlobStore(home.blobs)
    coordinator = Coordinator(store, blobs, home, config, clock)
    quota = DiskQuota(home, config.max_disk_bytes, config.max_unfinished_uploads)
    authority = ensure_authority(home)
    return Services(store, blobs, home, coordinator, config, quota, authority, clock)


@contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """Open the listening socket before anything else, so that a taken port changes nothing.

    Raises:
        ConfigurationError: The address is taken or is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    with listener:
        if os.name == "posix":  # elsewhere this option would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host} port {port}: {error.strerror or error}",
                remedy="Stop the other program on this port, or choose another --port or --host.",
            ) from error
        yield listener


def port_of(listener: socket.socket) -> int:
    """Give the port of a listening socket."""
    return int(listener.getsockname()[1])


class GracefulServer(uvicorn.Server):
    """uvicorn, except that a signal ends it with success and long-polls are answered first."""

    _doors: Doors | None = None
    _freshness: asyncio.Task[None] | None = None

    def __init__(
        self, services: Services, on_ready: Callable[[], None], tls: ServerTls | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(services),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                ws="none",
                http=BoundedProtocol if tls is None else self._secured_by(tls),
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                proxy_headers=bool(services.config.trusted_proxies),
                forwarded_allow_ips=list(services.config.trusted_proxies),
                limit_concurrency=most_connections(services.config.max_clients) + 1,
                backlog=_ACCEPTS_AT_ONCE,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        self._services = services
        self._on_ready = on_ready
        self._tls = tls

    def _secured_by(self, tls: ServerTls) -> type[asyncio.Protocol]:
        """Let uvicorn make secured connections where it would make plain ones."""
        self._doors = Doors(tls.context)
        return cast("type[asyncio.Protocol]", self._doors)

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        tell_rarely_of_failed_accepts(asyncio.get_running_loop())
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)  # asyncio has told the system its own, small one
        if self._tls is not None:
            self._freshness = asyncio.create_task(self._tls.keep_fresh())
        self._on_ready()

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._services.changes.close()
        if self._freshness is not None:
            self._freshness.cancel()
        if self._doors is not None:
            self._doors.close()
        await super().shutdown(sockets)

    @override
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal, without raising it again afterwards."""
        if threading.current_thread() is not threading.main_thread():  # signals never arrive here
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, disposition in previous.items():
                signal.signal(number, disposition)


def _announce(home: ServerHome, config: ServerConfig, listener: socket.socket) -> None:
    port = port_of(listener)
    url = url_of(config.host, port, is_secure=is_secured(config))
    place = {
        "url": url,
        "address": site_address(config, port, socket.gethostname()),
        "pid": os.getpid(),
        "version": __version__,
        "protocol": PROTOCOL_VERSION,
    }
    with disk_errors("writing where the server listens"):
        write_durably(home.server_file, json.dumps(place).encode())
    sys.stdout.write(f"fedra-server listening on {url}\n")
    sys.stdout.flush()
