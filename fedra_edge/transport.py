"""One HTTP connection pool to one server: headers, limits in time, errors, counted bytes."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import httpx
from pydantic import ValidationError

from fedra_edge.bandwidth import Bandwidth
from fedra_edge.errors import (
    ConfigurationError,
    FedraEdgeError,
    NotAuthenticatedError,
    ProtocolMismatchError,
    ServerUnreachableError,
    UnexpectedAnswerError,
)
from fedra_edge.link import Link, trusted, tune
from fedra_edge.network_errors import Way, mapped_errors
from fedra_edge.protocol.problems import Problem, ProblemCode
from fedra_edge.protocol.routes import Route
from fedra_edge.protocol.version import (
    PROTOCOL_HEADER,
    PROTOCOL_VERSION,
    is_compatible,
    skew,
    upgrade_advice,
)
from fedra_edge.protocol.wire import WireModel
from fedra_edge.refusals import WRONG_ADDRESS, check_encoding, refusal_of

LOGGER: Final = logging.getLogger(__name__)
CONNECT_S: Final = 10.0
_UNPUNCTUAL_S: Final = 10.0
_SLOWEST_WORK_BYTES_PER_S: Final = 10**6
"""How slowly a server may check and sync what it was sent without being taken for gone."""
_MAX_PROBLEM_BYTES: Final = 64 * 1024
_MAX_ANSWER_BYTES: Final = 64 * 2**20

_DIRECT: Final = Link()

Parsed = TypeVar("Parsed", bound=WireModel)


@dataclass(frozen=True)
class Traffic:
    """Body bytes that crossed the wire."""

    bytes_received: int
    bytes_sent: int


class Sessions(Protocol):
    """Where the bearer secret of requests comes from; any thread may ask."""

    def get(self) -> str:
        """Give the session, made now if there was none."""
        ...

    def renew(self, stale: str) -> str | None:
        """Give another one than this, which has ended; None when there is no other."""
        ...


@dataclass(frozen=True)
class Request:
    """One call, ready to be sent; ``content`` may be produced each time that it is sent.

    ``is_anonymous`` is what needs no session, and makes them.
    The server may be silent for the link's idle time, for ``wait_s`` when it was asked to hold
    its answer back so long, and while it works through ``work_bytes``.
    """

    route: Route
    path: str
    query: Mapping[str, str | float] | None = None
    headers: Mapping[str, str] | None = None
    content: bytes | Callable[[], Iterable[bytes]] = b""
    wait_s: float = 0.0
    work_bytes: int = 0
    is_anonymous: bool = False
    most_answered_bytes: int = _MAX_ANSWER_BYTES


@dataclass(frozen=True)
class Answer:
    """A successful answer that is held in memory as a whole."""

    headers: httpx.Headers
    content: bytes


def json_request(
    route: Route, path: str, body: WireModel | None = None, *, is_anonymous: bool = False
) -> Request:
    """Prepare a call whose body, if any, is a value."""
    if body is None:
        return Request(route, path, is_anonymous=is_anonymous)
    media = {"Content-Type": "application/json"}
    content = body.model_dump_json().encode()
    return Request(route, path, headers=media, content=content, is_anonymous=is_anonymous)


def open_http_client(server: str, link: Link = _DIRECT) -> httpx.Client:
    """Open the connection pool; what the link does not say comes from the environment."""
    try:
        return httpx.Client(base_url=server, proxy=link.proxy, verify=trusted(link))
    except (httpx.InvalidURL, ValueError, OSError, ImportError) as error:
        raise ConfigurationError(
            f"cannot prepare connections to {server}: {error}",
            remedy="check the address and --proxy, and HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE",
        ) from error


class Transport:
    """Sends requests over an injected ``httpx.Client`` and turns every failure into our errors."""

    def __init__(
        self, client: httpx.Client, link: Link = _DIRECT, bandwidth: Bandwidth | None = None
    ) -> None:
        self._client = client
        self.link = link
        self.bandwidth = bandwidth or Bandwidth(link.max_bytes_per_s)
        self._sessions: Sessions | None = None
        self._lock = threading.Lock()
        self._bytes_received = 0
        self._bytes_sent = 0
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._interrupted = threading.Event()
        self._server_speaks = PROTOCOL_VERSION

    def authenticate(self, sessions: Sessions) -> None:
        """Send a session with every request from now on, and a new one when it has ended."""
        self._sessions = sessions

    def trust(self, link: Link) -> None:
        """Go over another link from now on, with new connections; none may be in use."""
        before, server = self._client, str(self._client.base_url)
        self._client, self.link = open_http_client(server, link), link
        before.close()

    @property
    def traffic(self) -> Traffic:
        """Body bytes so far, in both directions."""
        with self._lock:
            return Traffic(self._bytes_received, self._bytes_sent)

    def ask(self, request: Request, answer: type[Parsed]) -> Parsed:
        """Send a request whose answer is a value.

        Raises:
            ServerUnreachableError: No answer, or "not now".
            UnexpectedAnswerError: An answer that is no such value.
            ServerRefusedError: The server says no.
        """
        content = self.send(request).content
        try:
            return answer.model_validate_json(content)
        except ValidationError as error:
            raise UnexpectedAnswerError(
                f"{request.route.method} {request.path} was answered by something else than "
                f"a {answer.__name__}",
                remedy="check that --server is the address of a Fedra server of this version",
            ) from error

    def send(self, request: Request) -> Answer:
        """Send a request and read its whole, small answer.

        Raises:
            UnexpectedAnswerError: The answer does not end where every answer should have ended.
        """
        content = bytearray()
        with self.stream(request) as response:
            for chunk in self.received(response):
                content += chunk
                if len(content) > request.most_answered_bytes:
                    raise UnexpectedAnswerError(
                        f"{request.route.method} {request.path} was answered by more than "
                        f"{request.most_answered_bytes} bytes",
                        remedy=WRONG_ADDRESS,
                    )
            return Answer(response.headers, bytes(content))

    @contextlib.contextmanager
    def stream(self, request: Request) -> Iterator[httpx.Response]:
        """Send a request and give the answer before its body is read; refusals are raised.

        It is sent once more when the session has ended.
        """
        sessions = None if request.is_anonymous else self._sessions
        session = sessions.get() if sessions is not None else None
        try:
            response = self._answer(request, session)
        except NotAuthenticatedError:
            renewed = sessions.renew(session) if sessions is not None and session else None
            if renewed is None:
                raise
            response = self._answer(request, renewed)
        try:
            yield response
        finally:
            response.close()

    def _answer(self, request: Request, session: str | None) -> httpx.Response:
        """Send a request and give the answer if it is a good one; it is to be closed."""
        if self._client.is_closed:
            raise ServerUnreachableError("this client's connections are closed")
        way = Way(is_pinned=self.link.is_pinned)
        with mapped_errors(way):
            response = self._client.send(self._build(request, session, way), stream=True)
        try:
            self._check(response)
        except BaseException:
            response.close()
            raise
        return response

    def received(self, response: httpx.Response) -> Iterator[bytes]:
        """Yield the answer's body as it comes, counted."""
        with mapped_errors(Way()):
            for chunk in response.iter_raw():
                self._count(received=len(chunk))
                yield chunk

    def streamed(self, response: httpx.Response) -> Iterator[bytes]:
        """Do the same with a large body, no faster than the site permits."""
        for chunk in self.received(response):
            yield chunk
            self.bandwidth.wait(self._interrupted)

    def interrupt(self) -> None:
        """Wake whoever waits for the server, by ending the connections; ``reopen`` undoes it."""
        with self._lock:
            self._interrupted.set()
        self._end_connections()

    @contextlib.contextmanager
    def ending_after(self, limit_s: float) -> Iterator[None]:
        """End the connections when the block takes longer, however the server spins it out."""
        timer = threading.Timer(limit_s, self._end_connections)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_connections(self) -> None:
        with self._lock:
            connections = list(self._sockets)
        for connection in connections:
            _end(connection)

    def reopen(self) -> None:
        """Let requests through again after an interrupt."""
        with self._lock:
            self._interrupted.clear()

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _build(self, request: Request, session: str | None, way: Way) -> httpx.Request:
        headers = {
            PROTOCOL_HEADER: PROTOCOL_VERSION,
            "Accept-Encoding": "identity",
            **(request.headers or {}),
        }
        if session is not None:
            headers["Authorization"] = f"Bearer {session}"
        timeout = httpx.Timeout(self.link.idle_s, connect=CONNECT_S, read=self._patience_s(request))
        built = self._client.build_request(
            request.route.method,
            request.path,
            params=dict(request.query) if request.query else None,
            headers=headers,
            content=self._counted(request.content),
            timeout=timeout,
        )
        url = built.url

        def trace(event: str, info: Mapping[str, Any]) -> None:
            way.note(event, info, url)
            self._remember_socket(event, info)

        built.extensions["trace"] = trace
        return built

    def _patience_s(self, request: Request) -> float:
        """Tell how long the server may be silent; one that holds an answer back is punctual."""
        if request.wait_s:
            return request.wait_s + min(self.link.idle_s, _UNPUNCTUAL_S)
        return self.link.idle_s + request.work_bytes / _SLOWEST_WORK_BYTES_PER_S

    def _counted(self, content: bytes | Callable[[], Iterable[bytes]]) -> bytes | Iterator[bytes]:
        if isinstance(content, bytes):
            self._count(sent=len(content))
            return content
        return self._count_while_sending(content())

    def _count_while_sending(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        step = self.bandwidth.portion_bytes
        for chunk in chunks:
            for start in range(0, len(chunk), step):
                portion = chunk[start : start + step]
                self.bandwidth.wait(self._interrupted)
                yield portion
                self._count(sent=len(portion))

    def _count(self, *, received: int = 0, sent: int = 0) -> None:
        self.bandwidth.spend(received + sent)
        with self._lock:
            self._bytes_received += received
            self._bytes_sent += sent

    def _remember_socket(self, event: str, info: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            connection = info["return_value"].get_extra_info("socket")
            if isinstance(connection, socket.socket):
                with self._lock:
                    self._sockets.add(connection)
                    is_late = self._interrupted.is_set()
                tune(connection)
                if is_late:
                    _end(connection)

    def _check(self, response: httpx.Response) -> None:
        self._check_version(response)
        if not response.is_success:
            raise self._refusal(response)
        check_encoding(response)

    def _check_version(self, response: httpx.Response) -> None:
        """Refuse an answer of another major version, and log another minor one once.

        A server that refuses knows its own release, so what it says is passed on.
        """
        theirs = response.headers.get(PROTOCOL_HEADER, PROTOCOL_VERSION)[:20]
        if is_compatible(PROTOCOL_VERSION, theirs):
            if theirs != self._server_speaks and (word := skew(PROTOCOL_VERSION, theirs)):
                told = "the server speaks protocol %s, %s than this client's %s; both work together"
                LOGGER.info(told, theirs, word, PROTOCOL_VERSION)
            self._server_speaks = theirs
            return
        code = ProblemCode.PROTOCOL_MISMATCH
        refusal = None if response.is_success else self._refusal(response)
        if isinstance(refusal, ProtocolMismatchError):
            raise refusal
        detail = f"the server speaks protocol {theirs}, this client {PROTOCOL_VERSION}"
        remedy = upgrade_advice(PROTOCOL_VERSION, theirs)
        raise ProtocolMismatchError(Problem.of(code, status=426, detail=detail), remedy=remedy)

    def _refusal(self, response: httpx.Response) -> FedraEdgeError:
        body = b""
        for chunk in self.received(response):
            body += chunk
            if len(body) > _MAX_PROBLEM_BYTES:
                break
        return refusal_of(response, body)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
