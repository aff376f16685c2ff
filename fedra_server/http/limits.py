"""What holds for every request: bodies are limited, early refusals arrive, versions are told."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.routes import UPLOAD_APPEND, UPLOAD_WHOLE
from fedra_edge.protocol.version import PROTOCOL_HEADER, PROTOCOL_VERSION
from fedra_server.http.problems import ANSWERS, problem_response

_LINGER_S: Final = 10.0
_MAX_SILENCE_S: Final = 60.0
"""A sender whose body pauses for longer is treated as gone, so that it holds nothing for ever."""
_MAX_BODY_S: Final = 120.0
"""How long any body but an upload's may take, of which each byte could come just in time."""
_UPLOADS: Final = UPLOAD_APPEND.fill(upload_id="")


class BodyLimit:
    """Lets a body of at most ``max_bytes`` through; uploads check their own, exact limit."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a body that is announced too large; count the bytes of any other."""
        if scope["type"] != "http" or self._is_upload(scope):
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isascii() or not announced.isdigit() or int(announced) > self._max_bytes:
            refusal = problem_response(ProblemCode.REQUEST_TOO_LARGE, self._detail)
            await refusal(scope, receive, send)
            return
        await self._app(scope, self._counting(receive), send)

    @property
    def _detail(self) -> str:
        return f"a request of this kind has at most {self._max_bytes} bytes"

    def _is_upload(self, scope: Scope) -> bool:
        path: str = scope["path"]
        is_append = scope["method"] == UPLOAD_APPEND.method and path.startswith(_UPLOADS)
        return is_append or (scope["method"], path) == (UPLOAD_WHOLE.method, UPLOAD_WHOLE.path)

    def _counting(self, receive: Receive) -> Receive:
        received_bytes = 0
        is_over = False
        deadline = asyncio.get_running_loop().time() + _MAX_BODY_S

        async def receive_counted() -> Message:
            nonlocal received_bytes, is_over
            try:
                async with asyncio.timeout_at(None if is_over else deadline):
                    message = await receive()
            except TimeoutError as error:
                status = ANSWERS[ProblemCode.BODY_TOO_SLOW].status
                told = f"the body was not there after {_MAX_BODY_S:g} s"
                raise HTTPException(status, told, {"Connection": "close"}) from error
            is_over = not message.get("more_body")
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._max_bytes:
                status = ANSWERS[ProblemCode.REQUEST_TOO_LARGE].status
                raise HTTPException(status, self._detail)
            return message

        return receive_counted


class LingeringClose:
    """Makes sure that a refusal sent while the body is still arriving is read by the sender.

    Closing a socket with unread bytes resets the connection, and a reset destroys the answer on
    its way. So the answer goes out at once, and what still arrives is thrown away for a while.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; after its answer, read the rest of its body."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        has_body = "content-length" in headers or "transfer-encoding" in headers
        if not has_body or "expect" in headers:
            await self._app(scope, receive, send)
            return
        body = _WatchedBody(receive)

        async def send_then_drain(message: Message) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            if not is_last or body.is_over:
                await send(message)
                return
            await send({**message, "more_body": True})
            await body.drain()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, body.receive, send_then_drain)


class _WatchedBody:
    """A request's body that knows whether it has been read to its end."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_over = False

    async def receive(self) -> Message:
        """Give the next piece."""
        try:
            async with asyncio.timeout(None if self.is_over else _MAX_SILENCE_S):
                message = await self._receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        self.is_over = message["type"] != "http.request" or not message.get("more_body")
        return message

    async def drain(self) -> None:
        """Throw the rest away, for a limited time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while not self.is_over:
                    await self.receive()


class ProtocolStamp:
    """Adds the server's protocol version to every response, and lets nobody keep what may change.

    Much of it is for one caller only, or a secret: a response says when it may be kept.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and stamp the start of its response."""

        async def send_stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[PROTOCOL_HEADER] = PROTOCOL_VERSION
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, send_stamped if scope["type"] == "http" else send)
