"""Downloads of published bytes, whole or from where an earlier download broke off."""

from __future__ import annotations

import re
from typing import Annotated, Final, NamedTuple

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse

from fedra_edge.protocol import routes
from fedra_edge.protocol.files import iterate_chunks
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.wire import HexDigest
from fedra_server.http.auth import Caller, SpeaksProtocol
from fedra_server.http.models import IMMUTABLE
from fedra_server.http.mounting import FOR_CLIENTS, mount
from fedra_server.http.problems import RefusedWithHeadersError
from fedra_server.http.services import ServicesHere
from fedra_server.storage.durability import disk_errors

router = APIRouter(tags=["blobs"], dependencies=[SpeaksProtocol])

_MEDIA_TYPE: Final = "application/octet-stream"
_BYTES: Final = {"content": {_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
_RANGE: Final = re.compile(r"bytes=(?P<first>[0-9]{0,18})-(?P<last>[0-9]{0,18})", re.ASCII)


class Span(NamedTuple):
    """Bytes ``first`` up to and including ``last`` of a file."""

    first: int
    last: int

    @property
    def size_bytes(self) -> int:
        """How many bytes that is."""
        return self.last - self.first + 1


@mount(
    router,
    routes.BLOB,
    *FOR_CLIENTS,
    ProblemCode.NOT_FOUND,
    ProblemCode.RANGE_NOT_SATISFIABLE,
    response_class=StreamingResponse,
    responses={
        200: {"description": "All bytes.", **_BYTES},
        206: {"description": "The bytes that Range asked for.", **_BYTES},
        304: {"description": "The caller has these bytes already."},
    },
)
def download(
    sha256: HexDigest,
    services: ServicesHere,
    _client: Caller,
    wanted: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header(alias="If-Range")] = None,
    if_none_match: Annotated[str | None, Header(alias="If-None-Match")] = None,
) -> Response:
    """Stream a blob or one range of it; a blob never changes, so caches may keep it for ever."""
    path = services.blobs.path(sha256)
    etag = f'"{sha256}"'
    headers = {"ETag": etag, "Cache-Control": IMMUTABLE, "Accept-Ranges": "bytes"}
    if if_none_match is not None and _matches(etag, if_none_match):
        return Response(status_code=304, headers=headers)
    with disk_errors(f"reading blob {sha256}"):
        size_bytes = path.stat().st_size
    is_partial_welcome = if_range is None or if_range.strip() == etag
    span = parse_range(wanted, size_bytes) if wanted and is_partial_welcome else None
    if span is None:
        headers["Content-Length"] = str(size_bytes)
        return StreamingResponse(iterate_chunks(path), headers=headers, media_type=_MEDIA_TYPE)
    headers["Content-Length"] = str(span.size_bytes)
    headers["Content-Range"] = f"bytes {span.first}-{span.last}/{size_bytes}"
    chunks = iterate_chunks(path, span.first, span.size_bytes)
    return StreamingResponse(chunks, 206, headers=headers, media_type=_MEDIA_TYPE)


def parse_range(text: str, size_bytes: int) -> Span | None:
    """Read a Range header; None when it is to be ignored, as for several ranges at once.

    Raises:
        RefusedError: The range begins behind the last byte.
    """
    match = _RANGE.fullmatch(text.replace(" ", ""))
    if match is None or match["first"] == match["last"] == "":
        return None
    if match["first"] == "":
        suffix_bytes = min(int(match["last"]), size_bytes)
        span = Span(size_bytes - suffix_bytes, size_bytes - 1)
    else:
        last = int(match["last"]) if match["last"] else size_bytes - 1
        span = Span(int(match["first"]), min(last, size_bytes - 1))
        if match["last"] and last < span.first:
            return None
    if span.first >= size_bytes or span.size_bytes < 1:
        raise RefusedWithHeadersError(
            ProblemCode.RANGE_NOT_SATISFIABLE,
            f"the blob has {size_bytes} bytes, the range {text[:100]!r} is beyond them",
            {"Content-Range": f"bytes */{size_bytes}"},
        )
    return span


def _matches(etag: str, if_none_match: str) -> bool:
    candidates = (part.strip().removeprefix("W/") for part in if_none_match.split(","))
    return any(candidate in {etag, "*"} for candidate in candidates)
