"""A small HTTP server on a real port that answers exactly what a test scripts, cuts included."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pydantic import BaseModel
from typing_extensions import override

from fedra_edge.protocol.problems import PROBLEM_MEDIA_TYPE, Problem, ProblemCode
from fedra_edge.protocol.version import PROTOCOL_HEADER, PROTOCOL_VERSION


@dataclass(frozen=True)
class Received:
    """A request as it came over the wire."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """An answer; ``cut_after`` ends the connection after so many bytes of the body."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None

    @classmethod
    def of(cls, value: BaseModel, status: int = 200) -> Reply:
        """Answer with a value."""
        return cls(status, value.model_dump_json().encode(), {"Content-Type": "application/json"})

    @classmethod
    def problem(cls, code: ProblemCode, status: int, **headers: str) -> Reply:
        """Refuse with a problem document."""
        problem = Problem.of(code, status=status, detail=f"because of {code}")
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        media = {"Content-Type": PROBLEM_MEDIA_TYPE, **named}
        return cls(status, problem.model_dump_json().encode(), media)


Script = Callable[[Received], Reply]


class WireServer(ThreadingHTTPServer):
    """Answers every request with what the script says and remembers what came."""

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), _Conversation)
        self.script = script
        self.received: list[Received] = []

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(script: Script) -> Iterator[WireServer]:
    """Serve while the block lasts."""
    server = WireServer(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def scripted(*replies: Reply) -> Script:
    """Give these answers in turn, then the last one for ever."""
    remaining = list(replies)
    return lambda _received: remaining.pop(0) if len(remaining) > 1 else remaining[0]


def unused_port() -> int:
    """Find a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Conversation(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        received = Received(
            self.command, self.path, dict(self.headers.items()), self.rfile.read(length)
        )
        server = self.server
        assert isinstance(server, WireServer)
        server.received.append(received)
        reply = server.script(received)
        self.send_response(reply.status)
        for name, value in {PROTOCOL_HEADER: PROTOCOL_VERSION, **reply.headers}.items():
            self.send_header(name, value)
        if reply.status != 204:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: reply.cut_after])
        if reply.cut_after is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _answer  # noqa: N815

    @override
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
