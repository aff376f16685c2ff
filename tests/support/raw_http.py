"""Bytes that no HTTP library would send, over a real connection, and what is answered."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from fedra_edge.protocol.problems import Problem

_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class RawAnswer:
    """An answer as it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def problem(self) -> Problem:
        """The problem document that it is."""
        return Problem.model_validate_json(self.body)


class RawConnection:
    """One connection to a server."""

    def __init__(self, url: str, source: str = "") -> None:
        place = httpx.URL(url)
        self._socket = socket.create_connection(
            (place.host, place.port or 80), _TIMEOUT_S, source_address=(source, 0)
        )
        self._input = self._socket.makefile("rb")

    def send(self, data: bytes) -> None:
        """Send bytes; a server that has closed already is no failure."""
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def answer(self) -> RawAnswer:
        """Read one answer to its end."""
        status = int(self._input.readline().split()[1])
        headers: dict[str, str] = {}
        while line := self._input.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        size_bytes = int(headers.get("content-length", "0"))
        return RawAnswer(status, headers, self._input.read(size_bytes))

    @property
    def is_closed(self) -> bool:
        """Wait for more; tell whether the server has ended the connection instead."""
        try:
            return self._socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        """Let go of the socket."""
        self._input.close()
        self._socket.close()


@contextmanager
def raw_connection(url: str, source: str = "") -> Iterator[RawConnection]:
    """Have a connection for the length of a block, from any address of this machine."""
    connection = RawConnection(url, source)
    try:
        yield connection
    finally:
        connection.close()


def ask(url: str, data: bytes, source: str = "") -> RawAnswer:
    """Send bytes over a connection of their own and read what is answered."""
    with raw_connection(url, source) as connection:
        connection.send(data)
        return connection.answer()


def head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """Write a request line and headers; nothing is checked."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {headers[name]}" for name in headers)]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")
