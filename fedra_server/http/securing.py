"""TLS of the listening socket: which certificate it shows, and who may take how long to enter."""

from __future__ import annotations

import asyncio
import logging
import ssl
from asyncio.sslproto import SSLProtocol
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from typing_extensions import override

from fedra_server.addressing import names_here
from fedra_server.config import ServerConfig, ServerHome
from fedra_server.errors import ConfigurationError, FedraServerError
from fedra_server.http.connections import MAX_HEAD_S, BoundedProtocol
from fedra_server.issuing import issue_if_due

logger = logging.getLogger(__name__)

_MOST_ENTERING: Final = 256
"""Handshakes at once; whoever has taken longest makes room for the next."""
_FAREWELL_S: Final = 30
"""How long the last bytes of a connection may take, over whatever link, with the goodbye."""
_LAST_FAREWELL_S: Final = 1
"""The same when the server stops."""
_BUFFER_BYTES: Final = 2**15
"""What a connection reads at once; asyncio's own 256 KiB for each would be a lot for thousands."""
_NOBODY_WAITS: Final[Any] = None
"""In place of a future for the end of a handshake: the room behind the door is told."""
_CHECKS_PER_LIFE: Final = 100
_CHECKED_EVERY_S: Final = (0.2, 60.0)
_HANDSHAKE: Final = 0x16
_PLAIN_ANSWER: Final = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s"
)
_PLAIN_ADVICE: Final = b"This server speaks https only: use https:// in its address.\n"


class ChainFiles(NamedTuple):
    """A certificate with its chain, and its key; both may be in one file."""

    certificate: Path
    key: Path | None = None

    @property
    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Tell one content of the files from the next, without reading them."""
        stats = [path.stat() for path in (self.certificate, self.key) if path is not None]
        return tuple((it.st_mtime_ns, it.st_size) for it in stats)


class ServerTls:
    """The TLS context of a server; its certificate is replaced while connections go on."""

    def __init__(self, home: ServerHome, config: ServerConfig) -> None:
        self.context = _new_context()
        self._home = home
        self._config = config
        self._stamp: tuple[tuple[int, int], ...] = ()
        self.refresh()

    @property
    def check_every_s(self) -> float:
        """How long a certificate that is due may wait to be replaced."""
        shortest, longest = _CHECKED_EVERY_S
        life_s = self._config.certificate_days * 86_400
        return min(longest, max(shortest, life_s / _CHECKS_PER_LIFE))

    def refresh(self) -> None:
        """Show the certificate that is right by now; connections that exist keep theirs.

        Raises:
            ConfigurationError: The certificate cannot work.
            StorageError: The disk refused.
        """
        self._show(self._files())

    def _show(self, files: ChainFiles) -> None:
        try:
            stamp = files.stamp
        except OSError as error:
            raise _unusable(files, str(error)) from error
        if stamp == self._stamp:
            return
        _load(_new_context(), files)  # one that fails half-way must not be the one in use
        _load(self.context, files)
        self._stamp = stamp

    async def keep_fresh(self) -> None:
        """Refresh for ever; what fails is told, and the certificate in use stays."""
        while True:
            await asyncio.sleep(self.check_every_s)
            try:
                self._show(await asyncio.to_thread(self._files))
            except FedraServerError as error:
                logger.error("the certificate stays as it is: %s; %s", error, error.remedy)  # noqa: TRY400

    def _files(self) -> ChainFiles:
        config = self._config
        if config.certificate_file is not None:
            base = self._home.path
            key = None if config.key_file is None else base / config.key_file
            return ChainFiles(base / config.certificate_file, key)
        names = names_here(config)
        lifetime = timedelta(days=config.certificate_days)
        return ChainFiles(issue_if_due(self._home, names, lifetime))


class Doors:
    """Makes secured connections: each is let in once its handshake is done."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._entering: dict[_Door, None] = {}
        self._all: set[_Door] = set()

    def __call__(self, **of_server: Any) -> SSLProtocol:  # noqa: ANN401 (uvicorn's own)
        """Await one connection; uvicorn calls this as it would call a protocol."""
        return _Door(self._context, self._entering, self._all, _Room(**of_server))

    def close(self) -> None:
        """Let go of everyone who has not entered, and have the others leave without delay."""
        for door in list(self._entering):
            door.abort()
        for door in self._all:
            door.hurry()


class _Room(BoundedProtocol):
    """What is behind the door; it begins when the handshake is done."""

    door: _Door | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        if self.door is not None:
            self.door.open()
        super().connection_made(transport)


class _Door(SSLProtocol):
    """asyncio's own TLS, with a smaller buffer, and counted from its first byte."""

    max_size = _BUFFER_BYTES

    def __init__(
        self,
        context: ssl.SSLContext,
        entering: dict[_Door, None],
        everyone: set[_Door],
        room: _Room,
    ) -> None:
        super().__init__(
            asyncio.get_running_loop(),
            room,
            context,
            _NOBODY_WAITS,
            server_side=True,
            ssl_handshake_timeout=int(MAX_HEAD_S),
            ssl_shutdown_timeout=_FAREWELL_S,
        )
        room.door = self
        self._room = room
        self._entering = entering
        self._all = everyone
        self._plain: asyncio.Transport | None = None
        self._has_begun = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("TLS needs a stream")
        self._plain = transport
        limit = self._room.limit_concurrency
        if limit is not None and len(self._room.connections) >= limit:
            transport.abort()
            return
        if len(self._entering) >= _MOST_ENTERING:
            next(iter(self._entering)).abort()
        self._entering[self] = None
        self._all.add(self)
        super().connection_made(transport)

    @override
    def buffer_updated(self, nbytes: int) -> None:
        if not self._has_begun:
            self._has_begun = True
            if self.get_buffer(_BUFFER_BYTES)[0] != _HANDSHAKE and self._plain is not None:
                self._plain.write(_PLAIN_ANSWER % (len(_PLAIN_ADVICE), _PLAIN_ADVICE))
                self._plain.close()
                return
        super().buffer_updated(nbytes)

    @override
    def connection_lost(self, exc: BaseException | None) -> None:
        self._entering.pop(self, None)
        self._all.discard(self)
        super().connection_lost(exc)

    def open(self) -> None:
        """Let the connection in: it counts as one of the server's from here."""
        self._entering.pop(self, None)

    def hurry(self) -> None:
        """Wait hardly at all for the other side's goodbye."""
        self._ssl_shutdown_timeout = _LAST_FAREWELL_S

    def abort(self) -> None:
        """End the connection without another word."""
        self._entering.pop(self, None)
        if self._plain is not None:
            self._plain.abort()


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def _load(context: ssl.SSLContext, files: ChainFiles) -> None:
    try:
        context.load_cert_chain(files.certificate, files.key, password=lambda: "")
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        raise _unusable(files, reason) from error
    except OSError as error:
        raise _unusable(files, error.strerror or str(error)) from error


def _unusable(files: ChainFiles, reason: str) -> ConfigurationError:
    names = " and ".join(str(path) for path in files if path is not None)
    return ConfigurationError(
        f"the certificate in {names} cannot be used: {reason}",
        remedy="certificate_file holds the certificate and then its chain in PEM, key_file its key "
        "without a passphrase. Without both settings the server uses certificates of its own.",
    )
