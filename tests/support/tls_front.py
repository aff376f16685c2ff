"""A TLS front with a certificate authority of its own before a plain port of this machine."""

from __future__ import annotations

import contextlib
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from typing_extensions import override

_BLOCK_BYTES = 2**16


@dataclass(frozen=True)
class TlsFront:
    """Where it listens, and the authority that clients must trust."""

    url: str
    ca_file: Path


@contextmanager
def tls_front(directory: Path, target_port: int) -> Iterator[TlsFront]:
    """Terminate TLS while the block lasts; skips the test where openssl is missing."""
    ca_file, certificate, key = _issue(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with _Front(context, target_port) as front:
        thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield TlsFront(f"https://127.0.0.1:{front.server_address[1]}", ca_file)
        finally:
            front.shutdown()
            thread.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes until one side ends, and tell the other."""
    with contextlib.suppress(OSError):
        while block := source.recv(_BLOCK_BYTES):
            target.sendall(block)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def join_sockets(near: socket.socket, far: socket.socket) -> None:
    """Copy both ways until both are over."""
    back = threading.Thread(target=pump, args=(far, near))
    back.start()
    pump(near, far)
    back.join()


class _Front(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, context: ssl.SSLContext, target_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Conversation)
        self.context = context
        self.target_port = target_port


class _Conversation(socketserver.BaseRequestHandler):
    @override
    def handle(self) -> None:
        front = self.server
        assert isinstance(front, _Front)
        with (
            contextlib.suppress(OSError),  # a client that does not trust us hangs up
            front.context.wrap_socket(self.request, server_side=True) as near,
            socket.create_connection(("127.0.0.1", front.target_port)) as far,
        ):
            join_sockets(near, far)


def _issue(directory: Path) -> tuple[Path, Path, Path]:
    """Make an authority, and a certificate of it for this machine."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory.mkdir(parents=True, exist_ok=True)
    ca, ca_key = directory / "ca.pem", directory / "ca.key"
    certificate, key = directory / "server.pem", directory / "server.key"
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    authority = [*new, "-subj", "/CN=Plant", "-keyout", str(ca_key), "-out", str(ca)]
    usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    signed = [
        *new, "-subj", "/CN=server", "-CA", str(ca), "-CAkey", str(ca_key), "-keyout", str(key),
        "-out", str(certificate), "-addext", "subjectAltName=IP:127.0.0.1",
        "-addext", "basicConstraints=critical,CA:FALSE",
    ]  # fmt: skip
    for command in ([*authority, *usage], signed):
        subprocess.run(command, check=True, capture_output=True)
    return ca, certificate, key
