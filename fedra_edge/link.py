"""How a site reaches a server: over which proxy, trusting whom, how fast, how patiently."""

from __future__ import annotations

import contextlib
import socket
import ssl
from dataclasses import dataclass, field
from typing import Final

from fedra_edge.errors import ConfigurationError

IDLE_S: Final = 30.0
_UNSENT_BYTES: Final = 32 * 2**10
_OPTIONS: Final = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 4,
    "TCP_NOTSENT_LOWAT": _UNSENT_BYTES,
}


@dataclass(frozen=True)
class Link:
    """What a site may say of its way to a server.

    ``proxy`` and ``ca_file`` win over HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE. ``idle_s`` is how
    long nothing at all may happen on a connection before it is given up; a transfer that goes on
    may take any time. ``is_pinned`` says that the file holds what a join string named;
    ``is_verified`` is false only while a server is met whose authority is not known yet.
    """

    proxy: str | None = field(default=None, repr=False)  # it may hold a password
    ca_file: str | None = None
    max_bytes_per_s: int | None = None
    idle_s: float = IDLE_S
    is_pinned: bool = False
    is_verified: bool = True


def trusted(link: Link) -> ssl.SSLContext | bool:
    """Read whom to trust; True leaves it to the environment.

    Raises:
        ConfigurationError: The file cannot be read, or holds no certificate.
    """
    if not link.is_verified:
        return _trusting_anybody()
    if link.ca_file is None:
        return True
    return _trusting(link.ca_file)


def _trusting_anybody() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _trusting(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        is_read = isinstance(error, ssl.SSLError)
        reason = "it holds no certificate (PEM)" if is_read else error.strerror or str(error)
        raise ConfigurationError(
            f"the certificate authority's file {ca_file} is of no use: {reason}",
            remedy="give the certificate authority of your plant or proxy, as PEM, as --ca-file",
        ) from error


def tune(connection: socket.socket) -> None:
    """Let the system notice a peer that is gone, and keep little that is still to be sent.

    What waits in the system's buffer looks sent, but is neither safe nor progress.
    """
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS.items():
        if hasattr(socket, name):  # not every system has each of them
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
