"""Downloads of published bytes: one blob or a range of it, or many small blobs at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Annotated, Final, NamedTuple

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator

from fedra_edge.protocol import routes
from fedra_edge.protocol.files import iterate_chunks
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.wire import HexDigest
from fedra_server.http.auth import Caller, SpeaksProtocol
from fedra_server.http.models import IMMUTABLE
from fedra_server.http.mounting import FOR_CLIENTS, mount
from fedra_server.http.problems import RefusedWithHeadersError
from fedra_server.http.services import Services, ServicesHere
from fedra_server.storage.durability import disk_errors
from fedra_server.storage.records import ClientRecord

router = APIRouter(tags=["blobs"], dependencies=[SpeaksProtocol])

_MEDIA_TYPE: Final = "application/octet-stream"
_BYTES: Final = {"content": {_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
_MAX_BLOBS: Final = 256
_DIGESTS: Final = re.compile(rf"^[0-9a-f]{{64}}(,[0-9a-f]{{64}}){{0,{_MAX_BLOBS - 1}}}$", re.ASCII)
_BLOCK_BYTES: Final = 2**20
"""What is read at once: worth a trip to a thread, and little enough for many slow receivers."""
_RANGE: Final = re.compile(r"bytes=(?P<first>[0-9]{0,18})-(?P<last>[0-9]{0,18})", re.ASCII)


def _check_digests(text: str) -> str:
    """Match by Python: pydantic's own expressions take 4 MB for one that counts this far."""
    if _DIGESTS.fullmatch(text) is None:
        raise ValueError(f"give 1 to {_MAX_BLOBS} digests, comma-separated")
    return text


Digests = Annotated[
    str,
    AfterValidator(_check_digests),
    Query(description="Digests, comma-separated.", json_schema_extra={"pattern": _DIGESTS.pattern}),
]


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
    ProblemCode.NOT_ASSIGNED,
    ProblemCode.TRANSFER_EXHAUSTED,
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
    client: Caller,
    *,
    wanted: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header(alias="If-Range")] = None,
    if_none_match: Annotated[str | None, Header(alias="If-None-Match")] = None,
) -> Response:
    """Stream a blob or one range of it; a blob never changes, so caches may keep it for ever."""
    _require(services, client, [sha256])
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
        return _respond(_counted(services, client, iterate_chunks(path)), size_bytes, headers)
    headers["Content-Range"] = f"bytes {span.first}-{span.last}/{size_bytes}"
    chunks = _counted(services, client, iterate_chunks(path, span.first, span.size_bytes))
    return _respond(chunks, span.size_bytes, headers, 206)


@mount(
    router,
    routes.BLOBS,
    *FOR_CLIENTS,
    ProblemCode.NOT_FOUND,
    ProblemCode.NOT_ASSIGNED,
    ProblemCode.TRANSFER_EXHAUSTED,
    response_class=StreamingResponse,
    responses={200: {"description": "The bytes of all blobs, in the order asked.", **_BYTES}},
)
def download_many(
    sha256: Digests,
    services: ServicesHere,
    client: Caller,
) -> Response:
    """Stream blobs one after another, so that many small ones cost a single request."""
    digests = sha256.split(",")
    _require(services, client, digests)
    paths = [services.blobs.path(digest) for digest in digests]
    with disk_errors("reading blobs"):
        size_bytes = sum(path.stat().st_size for path in paths)
    chunks = _counted(services, client, chain.from_iterable(map(iterate_chunks, paths)))
    return _respond(chunks, size_bytes, {"Cache-Control": "no-store"})


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


def _require(services: Services, client: ClientRecord, digests: Sequence[str]) -> None:
    """Refuse what no work of the client names, and everything to one that had far too much."""
    services.reach.require_blobs(client, digests)
    wait_s = services.reach.wait_s(client, services.clock.now())
    if wait_s:
        raise RefusedWithHeadersError(
            ProblemCode.TRANSFER_EXHAUSTED,
            "this client has fetched several times what its work needs since the last revision",
            {"Retry-After": str(math.ceil(wait_s))},
        )


def _counted(services: Services, client: ClientRecord, chunks: Iterable[bytes]) -> Iterator[bytes]:
    return services.reach.counted(client, chunks, services.clock.now())


def _matches(etag: str, if_none_match: str) -> bool:
    candidates = (part.strip().removeprefix("W/") for part in if_none_match.split(","))
    return any(candidate in {etag, "*"} for candidate in candidates)


def _respond(
    chunks: Iterable[bytes], size_bytes: int, headers: Mapping[str, str], status: int = 200
) -> Response:
    """Answer with bytes whose number is known; few of them at once, many block by block."""
    told = {**headers, "Content-Length": str(size_bytes)}
    if size_bytes <= _BLOCK_BYTES:
        return Response(b"".join(chunks), status, headers=told, media_type=_MEDIA_TYPE)
    return StreamingResponse(_in_blocks(chunks), status, headers=told, media_type=_MEDIA_TYPE)


def _in_blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Gather the chunks of small files."""
    block = bytearray()
    for chunk in chunks:
        block += chunk
        if len(block) >= _BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)
