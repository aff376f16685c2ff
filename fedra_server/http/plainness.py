"""Refuses requests of forms that no client of ours uses, before anything else looks at them.

Each of them is harmless here and means something else to another program on the way, or would
cost memory. The connection that brought one is closed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import override

from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.routes import UPLOAD_WHOLE
from fedra_server.http.problems import RefusedBodyError, problem_response

MAX_HEAD_BYTES: Final = 32 * 1024
"""Of a request line and all headers; the longest of a client, for 128 blobs, takes 9 KiB."""
MAX_HEADERS: Final = 64
_TOLD: Final = 100
_PATH: Final = re.compile(r"/(?:[A-Za-z0-9._~-]+/)*[A-Za-z0-9._~-]*", re.ASCII)
_DOTS: Final = frozenset({".", ".."})
_HOST: Final = re.compile(
    r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}(?:%25[A-Za-z0-9._-]{1,32})?\])(?::[0-9]{1,5})?"
)
_SINGLE: Final = frozenset(
    {
        "authorization", "content-encoding", "content-type", "expect", "fedra-protocol",
        "manifest-length", "range", "repr-digest", "upload-complete", "upload-offset",
    }
)  # fmt: skip
_JSON: Final = frozenset({"application/json"})
_BYTES: Final = frozenset({"application/partial-upload", "application/octet-stream"})
_MEDIA_TYPES: Final = {"POST": _JSON, "PUT": _JSON, "PATCH": _BYTES}
_WITH_BYTES: Final = (UPLOAD_WHOLE.method, UPLOAD_WHOLE.path)

RawHeaders = Iterable[tuple[bytes, bytes]]


class Fault(NamedTuple):
    """Why a request is refused."""

    code: ProblemCode
    detail: str


class PlainRequests:
    """Lets through what has the form of the wire contract."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it and have its connection closed."""
        fault = find_fault(scope) if scope["type"] == "http" else None
        if fault is None:
            await self._app(scope, receive, send)
            return
        refusal = problem_response(*fault, headers={"Connection": "close"})
        await refusal(scope, receive, send)


def find_fault(scope: Scope) -> Fault | None:
    """Find the first rule of form that a request breaks."""
    if fault := _fault_of_size(scope):
        return fault
    headers = _by_name(scope["headers"])
    return (
        _fault_of_length(headers)
        or _fault_of_repeats(headers)
        or _fault_of_path(scope["raw_path"].decode("latin-1"))
        or _fault_of_host(headers.get("host", []))
        or _fault_of_body((scope["method"], scope["path"]), headers)
    )


def _fault_of_size(scope: Scope) -> Fault | None:
    headers = scope["headers"]
    head_bytes = len(scope["raw_path"]) + len(scope["query_string"])
    head_bytes += sum(len(name) + len(value) for name, value in headers)
    if head_bytes > MAX_HEAD_BYTES or len(headers) > MAX_HEADERS:
        most = f"{MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers"
        return Fault(ProblemCode.HEAD_TOO_LARGE, f"the head of a request has at most {most}")
    return None


def _by_name(raw: RawHeaders) -> dict[str, list[str]]:
    headers: dict[str, list[str]] = {}
    for name, value in raw:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return headers


def _fault_of_length(headers: dict[str, list[str]]) -> Fault | None:
    """Refuse what tells its length twice: two programs may believe different ones."""
    lengths, codings = headers.get("content-length", []), headers.get("transfer-encoding", [])
    if len(lengths) + len(codings) > 1:
        told = "the request tells the length of its body more than once"
        return Fault(ProblemCode.LENGTH_AMBIGUOUS, told)
    return None


def _fault_of_repeats(headers: dict[str, list[str]]) -> Fault | None:
    if repeated := sorted(name for name in _SINGLE if len(headers.get(name, [])) > 1):
        return Fault(ProblemCode.HTTP_MALFORMED, f"the request repeats {', '.join(repeated)}")
    return None


def _fault_of_path(path: str) -> Fault | None:
    if _PATH.fullmatch(path) is None or not _DOTS.isdisjoint(path.split("/")):
        return Fault(
            ProblemCode.PATH_MALFORMED,
            "a path has letters, digits and . _ ~ - between single slashes, nothing encoded, and "
            "leads nowhere up",
        )
    return None


def _fault_of_host(hosts: list[str]) -> Fault | None:
    if len(hosts) > 1 or not all(_HOST.fullmatch(host) for host in hosts):
        return Fault(ProblemCode.HOST_MALFORMED, "the Host header names no host")
    return None


def _fault_of_body(asked: tuple[str, str], headers: dict[str, list[str]]) -> Fault | None:
    expected = {value.strip().lower() for value in headers.get("expect", [])}
    if expected - {"100-continue"}:
        told = "nothing but 100-continue can be expected of this server"
        return Fault(ProblemCode.EXPECTATION_FAILED, told)
    encodings = {value.strip().lower() for value in headers.get("content-encoding", [])}
    if encodings - {"", "identity"}:
        told = "bodies are taken as they are; a compressed one could unfold to any size"
        return Fault(ProblemCode.ENCODING_UNSUPPORTED, told)
    known = _BYTES if asked == _WITH_BYTES else _MEDIA_TYPES.get(asked[0])
    told_types = {
        value.partition(";")[0].strip().lower() for value in headers.get("content-type", [])
    }
    if known is not None and told_types - known:
        told = f"a body of this request is {' or '.join(sorted(known))}"
        return Fault(ProblemCode.CONTENT_TYPE_UNSUPPORTED, told)
    return None


class PlainRoute(APIRoute):
    """A route whose JSON bodies are UTF-8, repeat no name and hold no infinities."""

    @override
    def get_route_handler(self) -> Any:
        """Have the handler read bodies strictly."""
        handle = super().get_route_handler()

        async def handle_plain(request: Request) -> Any:  # noqa: ANN401 (as above)
            return await handle(_PlainRequest(request.scope, request.receive))

        return handle_plain


class _PlainRequest(Request):
    @override
    async def json(self) -> Any:
        """Read the body as JSON."""
        return read_json(await self.body())


def read_json(body: bytes) -> Any:  # noqa: ANN401 (JSON is anything)
    """Read JSON that every reader reads alike.

    Raises:
        RefusedBodyError: It is no JSON, or two readers could take it for different things.
    """
    try:
        return json.loads(
            body.decode("utf-8"), object_pairs_hook=_refuse_repeats, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        told = f"the body is no JSON: {str(error)[:_TOLD]}"
        raise RefusedBodyError(ProblemCode.MALFORMED_REQUEST, told) from error


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise RefusedBodyError(ProblemCode.REPEATED_NAME, "an object of the body repeats a name")
    return names


def _refuse_constant(name: str) -> Any:  # noqa: ANN401 (never returns)
    raise ValueError(f"{name} is no number of JSON")
