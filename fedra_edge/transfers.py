"""Moves large bodies in either direction so that a cut connection costs only what was in flight."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx

from fedra_edge.durable_files import storage_errors
from fedra_edge.errors import (
    DeltaRefusedError,
    OffsetMismatchError,
    ServerUnreachableError,
    UnexpectedAnswerError,
)
from fedra_edge.protocol import routes
from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.files import iterate_chunks
from fedra_edge.protocol.ids import UploadId
from fedra_edge.protocol.messages import DeltaReceipt, UploadStatus
from fedra_edge.protocol.models import BlobRef
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.transport import Request, Transport, json_request

_PARTIAL: Final = 206


def download(transport: Transport, ref: BlobRef, part: Path) -> None:
    """Complete ``part``, at once again after every cut that let some bytes through.

    Raises:
        ServerUnreachableError: Not one more byte came.
        StorageError: The file cannot be written.
    """
    while (start := _size_of(part)) < ref.size_bytes or not part.exists():
        try:
            _download_rest(transport, ref, part, start)
        except ServerUnreachableError:
            if _size_of(part) <= start:
                raise


def upload(transport: Transport, manifest: DeltaManifest, file: Path) -> DeltaReceipt:
    """Bring a delta to the server, from the byte on that the server does not hold yet.

    Raises:
        RoundClosedError: The round went on without it.
        DeltaRefusedError: Admission turned it down.
    """
    try:
        status = transport.ask(_announcement(manifest), UploadStatus)
        return _append(transport, UploadId(status.upload_id), file, status.offset_bytes)
    except OffsetMismatchError as error:  # an earlier, cut request is still being taken in
        raise ServerUnreachableError(
            f"the upload stands at byte {error.offset_bytes}: {error}", retry_after_s=0.5
        ) from error
    except DeltaRefusedError as error:
        if error.problem.code is not ProblemCode.DIGEST_MISMATCH:
            raise
        raise ServerUnreachableError(
            f"the delta was damaged on its way: {error}", remedy=error.remedy
        ) from error


def upload_offset(transport: Transport, upload_id: UploadId) -> int:
    """Ask how many bytes of an upload the server holds."""
    path = routes.UPLOAD_OFFSET.fill(upload_id=upload_id)
    response = transport.send(Request(routes.UPLOAD_OFFSET, path))
    offset = response.headers.get(routes.UPLOAD_OFFSET_HEADER, "")
    if not offset.isdecimal():
        raise UnexpectedAnswerError("the server does not say where the upload stands")
    return int(offset)


def _announcement(manifest: DeltaManifest) -> Request:
    return json_request(routes.UPLOAD_CREATE, routes.UPLOAD_CREATE.path, manifest)


def _append(transport: Transport, upload_id: UploadId, file: Path, offset: int) -> DeltaReceipt:
    with storage_errors(f"read {file}"):
        rest_bytes = max(0, file.stat().st_size - offset)
    headers = {
        routes.UPLOAD_OFFSET_HEADER: str(offset),
        routes.UPLOAD_COMPLETE_HEADER: "?1",
        "Content-Type": "application/octet-stream",
        "Content-Length": str(rest_bytes),
    }
    path = routes.UPLOAD_APPEND.fill(upload_id=upload_id)
    content = iterate_chunks(file, offset) if rest_bytes else b""
    request = Request(routes.UPLOAD_APPEND, path, headers=headers, content=content)
    return transport.ask(request, DeltaReceipt)


def _download_rest(transport: Transport, ref: BlobRef, part: Path, start: int) -> None:
    headers = {"Range": f"bytes={start}-"} if start else None
    request = Request(routes.BLOB, routes.BLOB.fill(sha256=ref.sha256), headers=headers)
    with transport.stream(request) as response:
        begin = start if _continues_at(response, start) else 0
        _write(part, begin, transport.received(response), ref.size_bytes)


def _continues_at(response: httpx.Response, start: int) -> bool:
    if response.status_code != _PARTIAL:
        return False
    if not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
        raise UnexpectedAnswerError("the server sent another part of the file than asked for")
    return True


def _write(part: Path, begin: int, chunks: Iterator[bytes], size_bytes: int) -> None:
    position = begin
    with storage_errors(f"write {part}"), part.open("r+b" if begin else "wb") as file:
        file.seek(begin)
        for chunk in chunks:
            position += len(chunk)
            if position > size_bytes:
                break
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if position != size_bytes:
        with contextlib.suppress(OSError):
            if position > size_bytes:
                part.unlink()
        raise UnexpectedAnswerError(f"the file has {position} bytes or more, not {size_bytes}")


def _size_of(part: Path) -> int:
    with storage_errors(f"read {part}"):
        return part.stat().st_size if part.exists() else 0
