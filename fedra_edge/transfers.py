"""Moves large bodies in either direction so that a cut connection costs only what was in flight."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import partial
from io import FileIO
from itertools import chain
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
from fedra_edge.metering import OnBytes, unwatched
from fedra_edge.protocol import routes
from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.digests import format_digest
from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.files import iterate_chunks
from fedra_edge.protocol.ids import UploadId
from fedra_edge.protocol.messages import DeltaReceipt, UploadStatus
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.wire import byte_count_of
from fedra_edge.transport import Request, Transport, json_request

APPEND_BYTES: Final = 8 * 2**20
"""How much of a delta goes in one request; the server's answer says that it is on its disk."""
_WHOLE_BYTES: Final = 4 * 2**20
"""How large a delta may be that is sent before the server has said that it wants it."""
_PARTIAL: Final = 206
_PORTION_BYTES: Final = 2**18
_UNSENT_BYTES: Final = 32 * 10**6
"""Counts what the system still has to send, over the slowest link, like work of the server."""


class Download:
    """A file on its way: what came is kept, and digested as it comes.

    Args:
        transport: The connections to where it comes from.
        request: Asks for the file; its range is added.
        part: Where it goes; what lies there already is its beginning.
        size_bytes: Its size.
        on_bytes: Told of all bytes that are there.
    """

    def __init__(
        self,
        transport: Transport,
        request: Request,
        part: Path,
        size_bytes: int,
        on_bytes: OnBytes = unwatched,
    ) -> None:
        self._transport = transport
        self._request = request
        self._part = part
        self._size_bytes = size_bytes
        self._on_bytes = on_bytes
        self._digest = hashlib.sha256()
        self._position = 0
        self._is_begun = False

    def complete(self) -> str:
        """Fetch the rest, at once again after every cut that let some bytes through.

        Gives the sha256 of the file. It may be called again after it failed.

        Raises:
            ServerUnreachableError: Not one more byte came.
            StorageError: The file cannot be written.
        """
        if not self._is_begun:
            self._look_at_what_is_there()
        while (start := self._position) < self._size_bytes:
            try:
                self._fetch_rest(start)
            except ServerUnreachableError:
                if self._position <= start:
                    raise
        return self._digest.hexdigest()

    def _look_at_what_is_there(self) -> None:
        with storage_errors(f"read {self._part}"):
            self._part.touch()
            if self._part.stat().st_size > self._size_bytes:
                os.truncate(self._part, 0)
            for chunk in iterate_chunks(self._part):
                self._note(chunk)
        self._is_begun = True

    def _fetch_rest(self, start: int) -> None:
        headers = {"Range": f"bytes={start}-"} if start else None
        request = Request(self._request.route, self._request.path, headers=headers)
        with self._transport.stream(request) as response:
            if start and not _continues_at(response, start):
                self._begin_anew()
            self._write(self._transport.streamed(response))

    def _write(self, chunks: Iterable[bytes]) -> None:
        with (
            storage_errors(f"write {self._part}"),
            self._part.open("r+b", buffering=0) as file,
        ):
            file.truncate(self._position)
            file.seek(self._position)
            for chunk in chunks:
                if self._position + len(chunk) > self._size_bytes:
                    file.truncate(0)
                    self._begin_anew()
                    raise UnexpectedAnswerError(f"the file has more than {self._size_bytes} bytes")
                _write_all(file, chunk)
                self._note(chunk)
            os.fsync(file.fileno())
        if self._position < self._size_bytes:
            raise UnexpectedAnswerError(
                f"the file has {self._position} bytes, not {self._size_bytes}"
            )

    def _begin_anew(self) -> None:
        self._on_bytes(-self._position)
        self._digest, self._position = hashlib.sha256(), 0

    def _note(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self._position += len(chunk)
        self._on_bytes(len(chunk))


class Upload:
    """A delta on its way to the server, in requests of bounded size.

    Args:
        transport: The connections to the server.
        manifest: What the delta is.
        file: Where it lies.
        on_bytes: Told of all bytes that are on their way or at the server.
        is_new: Nothing of it was sent before, so that a small one goes in one request.
    """

    def __init__(
        self,
        transport: Transport,
        manifest: DeltaManifest,
        file: Path,
        on_bytes: OnBytes = unwatched,
        *,
        is_new: bool = False,
    ) -> None:
        self._transport = transport
        self._manifest = manifest
        self._file = file
        self._on_bytes = on_bytes
        self._told_bytes = 0
        self._goes_whole = is_new and manifest.size_bytes <= _WHOLE_BYTES

    def complete(self) -> DeltaReceipt:
        """Bring the delta to the server, from the byte on that the server does not hold yet.

        After every cut that let some bytes through it goes on at once.

        Raises:
            ServerUnreachableError: Not one more byte came there.
            RoundClosedError: The round went on without it.
            DeltaRefusedError: Admission turned it down.
        """
        try:
            return self._send()
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

    def _send(self) -> DeltaReceipt:
        failure: ServerUnreachableError | None = None
        reached = 0
        if self._goes_whole:
            self._goes_whole = False
            try:
                return self._transport.ask(self._whole(), DeltaReceipt)
            except ServerUnreachableError as error:
                failure = error
        while True:
            status = self._transport.ask(self._announcement(), UploadStatus)
            if failure is not None and status.offset_bytes <= reached:
                raise failure
            reached = status.offset_bytes
            try:
                return self._send_rest(UploadId(status.upload_id), reached)
            except ServerUnreachableError as error:
                failure = error

    def _send_rest(self, upload_id: UploadId, offset: int) -> DeltaReceipt:
        size_bytes = self._manifest.size_bytes
        while size_bytes - offset > APPEND_BYTES:
            self._transport.send(self._append(upload_id, offset, APPEND_BYTES, complete=False))
            offset += APPEND_BYTES
        last = self._append(upload_id, offset, size_bytes - offset, complete=True)
        return self._transport.ask(last, DeltaReceipt)

    def _announcement(self) -> Request:
        return json_request(routes.UPLOAD_CREATE, routes.UPLOAD_CREATE.path, self._manifest)

    def _whole(self) -> Request:
        announcement = self._manifest.model_dump_json().encode()
        size_bytes = self._manifest.size_bytes
        headers = {
            routes.MANIFEST_LENGTH_HEADER: str(len(announcement)),
            "Content-Type": "application/partial-upload",
            "Content-Length": str(len(announcement) + size_bytes),
        }
        return Request(
            routes.UPLOAD_WHOLE,
            routes.UPLOAD_WHOLE.path,
            headers=headers,
            content=lambda: chain([announcement], self._told(0, size_bytes)),
            work_bytes=_UNSENT_BYTES + size_bytes,
        )

    def _append(
        self, upload_id: UploadId, offset: int, size_bytes: int, *, complete: bool
    ) -> Request:
        headers = {
            routes.UPLOAD_OFFSET_HEADER: str(offset),
            routes.UPLOAD_COMPLETE_HEADER: "?1" if complete else "?0",
            "Content-Type": "application/partial-upload",
            "Content-Length": str(size_bytes),
            routes.DIGEST_HEADER: format_digest(self._manifest.sha256),
        }
        return Request(
            routes.UPLOAD_APPEND,
            routes.UPLOAD_APPEND.fill(upload_id=upload_id),
            headers=headers,
            content=partial(self._told, offset, size_bytes) if size_bytes else b"",
            work_bytes=_UNSENT_BYTES + (self._manifest.size_bytes if complete else size_bytes),
        )

    def _told(self, offset: int, size_bytes: int) -> Iterator[bytes]:
        with storage_errors(f"read {self._file}"):
            for chunk in iterate_chunks(self._file, offset, size_bytes):
                for start in range(0, len(chunk), _PORTION_BYTES):
                    portion = chunk[start : start + _PORTION_BYTES]
                    yield portion
                    offset += len(portion)
                    self._on_bytes(offset - self._told_bytes)
                    self._told_bytes = offset


def upload_offset(transport: Transport, upload_id: UploadId) -> int:
    """Ask how many bytes of an upload the server holds."""
    path = routes.UPLOAD_OFFSET.fill(upload_id=upload_id)
    response = transport.send(Request(routes.UPLOAD_OFFSET, path))
    offset = byte_count_of(response.headers.get(routes.UPLOAD_OFFSET_HEADER, ""))
    if offset is None:
        raise UnexpectedAnswerError("the server does not say where the upload stands")
    return offset


def _continues_at(response: httpx.Response, start: int) -> bool:
    if response.status_code != _PARTIAL:
        return False
    if not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
        raise UnexpectedAnswerError("the server sent another part of the file than asked for")
    return True


def _write_all(file: FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[file.write(rest) :]
        fault_point("download.part")
