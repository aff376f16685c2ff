"""A web proxy as plants have them: tunnels by CONNECT, and plain requests passed on."""

from __future__ import annotations

import base64
import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from urllib.parse import urlsplit

from typing_extensions import override

from tests.support.tls_front import join_sockets, pump


class WebProxy(socketserver.ThreadingTCPServer):
    """Passes requests on and remembers their first lines; ``account`` is NAME:PASSWORD.

    ``instead_of`` has it tunnel to other places than it is asked for, as HOST:PORT.
    """

    daemon_threads = True

    def __init__(self, account: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _Conversation)
        self.seen: list[str] = []
        self.account = account
        self.instead_of: dict[str, str] = {}

    @property
    def url(self) -> str:
        """Where it listens, for those who have an account if there is one."""
        account = f"{self.account}@" if self.account else ""
        return f"http://{account}127.0.0.1:{self.server_address[1]}"


@contextmanager
def web_proxy(account: str | None = None) -> Iterator[WebProxy]:
    """Have a proxy while the block lasts."""
    with WebProxy(account) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


class _Conversation(socketserver.StreamRequestHandler):
    @override
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self._converse()

    def _converse(self) -> None:
        proxy = self.server
        assert isinstance(proxy, WebProxy)
        head = _read_head(self.rfile)
        if not head:
            return
        proxy.seen.append(head[0])
        if proxy.account is not None and not _is_known(head, proxy.account):
            self.wfile.write(
                b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
            )
            return
        method, target, _ = head[0].split(" ")
        target = proxy.instead_of.get(target, target)
        host, _, port = (target if method == "CONNECT" else urlsplit(target).netloc).rpartition(":")
        with socket.create_connection((host, int(port))) as far:
            if method == "CONNECT":
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                join_sockets(self.connection, far)
            else:
                self._pass_on(head, far)

    def _pass_on(self, head: list[str], far: socket.socket) -> None:
        """Pass request after request on, without the host in its first line."""
        proxy = self.server
        assert isinstance(proxy, WebProxy)
        back = threading.Thread(target=pump, args=(far, self.connection))
        back.start()
        while head:
            method, target, version = head[0].split(" ")
            parts = urlsplit(target)
            path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
            lines = [f"{method} {path} {version}", *head[1:]]
            kept = [line for line in lines if not line.lower().startswith("proxy-")]
            far.sendall("\r\n".join([*kept, "", ""]).encode())
            left_bytes = _body_bytes(head)
            while left_bytes > 0 and (block := self.rfile.read1(min(2**16, left_bytes))):
                far.sendall(block)
                left_bytes -= len(block)
            head = _read_head(self.rfile)
            proxy.seen += head[:1]
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_WR)
        back.join()


def _read_head(stream: BufferedIOBase) -> list[str]:
    """Read the lines before a body; none when the connection ends."""
    lines = []
    while (line := stream.readline().decode("latin-1").rstrip("\r\n")) != "":
        lines.append(line)
    return lines


def _field(head: list[str], name: str) -> str | None:
    fields = (line.partition(":") for line in head[1:])
    return next((value.strip() for key, _, value in fields if key.lower() == name), None)


def _body_bytes(head: list[str]) -> int:
    return int(_field(head, "content-length") or 0)


def _is_known(head: list[str], account: str) -> bool:
    told = (_field(head, "proxy-authorization") or "").removeprefix("Basic ")
    return told == base64.b64encode(account.encode()).decode()
