"""Resumable uploads of adapter deltas, after the IETF draft for resumable uploads.

A delta is announced (POST), its bytes follow in any number of requests (PATCH), and a sender
that lost its connection asks how far it got (HEAD). An assignment has one upload at a time:
announcing other bytes for it discards those that arrived before.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Literal

from anyio import to_thread
from fastapi import APIRouter, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from fedra_edge.protocol import routes
from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.digests import parse_digest
from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.ids import RunId, UploadId
from fedra_edge.protocol.messages import DeltaReceipt, UploadStatus
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.wire import ByteCount, Token
from fedra_server.errors import NotPermittedError, RefusedError
from fedra_server.http.auth import Caller, SpeaksProtocol
from fedra_server.http.discarding import discard, discard_dead_uploads_of
from fedra_server.http.mounting import FOR_CLIENTS, mount
from fedra_server.http.problems import NotNowError, RefusedWithHeadersError
from fedra_server.http.receiving import BLOCK_BYTES, Patience, part_size_bytes, receive
from fedra_server.http.services import Services, ServicesHere
from fedra_server.storage.records import ClientRecord, UploadRecord

router = APIRouter(tags=["uploads"], dependencies=[SpeaksProtocol])

_BLOCKS_BYTES: Final = 2 * 2**20
"""What all requests together may gather before they write it."""
_ADMISSION: Final = (
    ProblemCode.ROUND_CLOSED,
    ProblemCode.DELTA_CONFLICT,
    ProblemCode.DELTA_TOO_LARGE,
    ProblemCode.STORAGE_FULL,
    ProblemCode.NOT_FOUND,
    ProblemCode.NOT_PERMITTED,
)
_TENSORS: Final = (
    ProblemCode.OFFSET_MISMATCH,
    ProblemCode.DIGEST_MISMATCH,
    ProblemCode.TENSORS_MALFORMED,
    ProblemCode.TENSOR_MISSING,
    ProblemCode.TENSOR_UNEXPECTED,
    ProblemCode.TENSOR_SHAPE,
    ProblemCode.TENSOR_DTYPE,
    ProblemCode.TENSOR_NOT_FINITE,
)
_OFFSET_HEADERS: Final = {
    routes.UPLOAD_OFFSET_HEADER: {
        "description": "Bytes that the server holds.",
        "schema": {"type": "integer"},
    },
    routes.UPLOAD_COMPLETE_HEADER: {
        "description": "Whether the delta is complete and admitted.",
        "schema": {"type": "string", "enum": ["?0", "?1"]},
    },
}
_BINARY: Final = {"schema": {"type": "string", "format": "binary"}}
_BODY: Final = {
    "required": True,
    "content": {"application/partial-upload": _BINARY, "application/octet-stream": _BINARY},
}


@mount(
    router,
    routes.UPLOAD_CREATE,
    *FOR_CLIENTS,
    *_ADMISSION,
    ProblemCode.OFFSET_MISMATCH,
    status_code=201,
)
def announce(
    delta: DeltaManifest, services: ServicesHere, client: Caller, response: Response
) -> UploadStatus:
    """Take note of a delta; announcing it again gives the same upload, as far as it got."""
    if services.is_sign_due(client):
        services.store.touch(client.client_id, services.clock.now())
    try:
        with services.store.reading():
            assignment = services.coordinator.intake.expect(client.client_id, delta)
            upload = services.store.upload_for(assignment.assignment_id, delta.sha256)
    except RefusedError:
        discard_dead_uploads_of(services, delta.id)
        raise
    services.receiving.take_over(delta.id)
    if upload is None:
        upload = _begin_upload(services, client, delta)
    offset_bytes = _offset_bytes(services, upload)
    _require_space(services, upload, offset_bytes)
    response.headers["Location"] = routes.UPLOAD_OFFSET.fill(upload_id=upload.upload_id)
    return UploadStatus(
        upload_id=upload.upload_id, offset_bytes=offset_bytes, size_bytes=delta.size_bytes
    )


@mount(
    router,
    routes.UPLOAD_OFFSET,
    *FOR_CLIENTS,
    ProblemCode.NOT_FOUND,
    ProblemCode.NOT_PERMITTED,
    response_class=Response,
    responses={200: {"description": "How far the upload got.", "headers": _OFFSET_HEADERS}},
)
def tell_offset(upload_id: Token, services: ServicesHere, client: Caller) -> Response:
    """Tell how many bytes of an upload the server holds."""
    upload = _own_upload(services, client, upload_id)
    services.receiving.take_over(upload.assignment_id)
    is_complete = _is_counted(services, upload)
    return Response(
        headers={
            routes.UPLOAD_OFFSET_HEADER: str(_offset_bytes(services, upload)),
            routes.UPLOAD_COMPLETE_HEADER: "?1" if is_complete else "?0",
            routes.UPLOAD_LENGTH_HEADER: str(upload.delta.size_bytes),
            "Cache-Control": "no-store",
        }
    )


@mount(
    router,
    routes.UPLOAD_APPEND,
    *FOR_CLIENTS,
    *_ADMISSION,
    *_TENSORS,
    response_model=DeltaReceipt,
    responses={
        200: {"description": "The delta is complete and admitted.", "model": DeltaReceipt},
        204: {"description": "The bytes are on disk.", "headers": _OFFSET_HEADERS},
    },
    openapi_extra={"requestBody": _BODY},
)
async def append(
    request: Request,
    upload_id: Token,
    services: ServicesHere,
    client: Caller,
    *,
    offset: Annotated[ByteCount, Header(alias=routes.UPLOAD_OFFSET_HEADER)],
    complete: Annotated[Literal["?0", "?1"], Header(alias=routes.UPLOAD_COMPLETE_HEADER)],
) -> Response:
    """Append bytes; they are on disk when the answer comes. The last ones complete the delta."""
    with ExitStack() as held:
        upload = await run_in_threadpool(_claim, services, client, upload_id, offset, held)
        _check_digest(upload, request.headers.get(routes.DIGEST_HEADER, ""))
        size_bytes = await _take_bytes(request, services, upload, offset)
        if complete == "?0":
            headers = {
                routes.UPLOAD_OFFSET_HEADER: str(size_bytes),
                routes.UPLOAD_COMPLETE_HEADER: complete,
            }
            return Response(status_code=204, headers=headers)
        if size_bytes < upload.delta.size_bytes:
            raise _offset_mismatch(services, upload, "bytes are missing before the end")
        run = await to_thread.run_sync(_check, services, upload, limiter=services.checks)
        in_turn = services.counting[run]
        receipt = await to_thread.run_sync(_count_in, services, upload, limiter=in_turn)
        headers = {routes.UPLOAD_COMPLETE_HEADER: complete}
        return JSONResponse(receipt.model_dump(mode="json"), headers=headers)


def _begin_upload(services: Services, client: ClientRecord, delta: DeltaManifest) -> UploadRecord:
    """Record a new upload in place of any other of its assignment."""
    with services.receiving.hold(delta.id) as is_free:
        others = services.store.uploads_of(delta.id)
        if not is_free:
            if not others:
                raise NotNowError("this delta is being announced already", retry_after_s=1)
            raise _offset_mismatch(services, others[-1], "another request is sending a delta")
        for other in others:
            if other.delta.sha256 == delta.sha256:  # announced twice at the same moment
                return other
            discard(services, other)
        upload = UploadRecord(
            upload_id=UploadId(secrets.token_hex(16)),
            assignment_id=delta.id,
            client_id=client.client_id,
            delta=delta,
            created_at=services.clock.now(),
        )
        services.store.add_upload(upload)
        fault_point("upload.created")
        return upload


def _claim(
    services: Services, client: ClientRecord, upload_id: str, offset: int, held: ExitStack
) -> UploadRecord:
    """Have an upload to oneself, as long as ``held`` is open, and make sure that bytes go there.

    The delta must still be wanted, and the bytes continue what is there.
    """
    upload = _own_upload(services, client, upload_id)
    services.receiving.take_over(upload.assignment_id)
    if not held.enter_context(services.receiving.hold(upload.assignment_id)):
        raise _offset_mismatch(services, upload, "another request is sending this delta")
    try:
        with services.store.reading():
            services.coordinator.intake.expect(upload.client_id, upload.delta)
            offset_bytes = _offset_bytes(services, upload)
    except RefusedError:
        discard(services, upload)
        raise
    if offset != offset_bytes:
        raise _offset_mismatch(services, upload, f"the upload does not stand at byte {offset}")
    return upload


async def _take_bytes(
    request: Request, services: Services, upload: UploadRecord, offset: int
) -> int:
    room_bytes = upload.delta.size_bytes - offset
    announced = request.headers.get("content-length", "0")
    if not announced.isascii() or not announced.isdigit() or int(announced) > room_bytes:
        raise RefusedError(
            ProblemCode.DELTA_TOO_LARGE,
            f"the upload has room for {room_bytes} more bytes, the request brings {announced[:20]}",
        )
    if room_bytes == 0:
        return offset
    part = services.home.upload_part(upload.upload_id)
    block_bytes = partial(_block_bytes, services)
    patience = Patience()
    services.receiving.end_with(upload.assignment_id, patience.end)
    size_bytes = await receive(part, request.stream(), room_bytes, patience, block_bytes)
    services.quota.note_arrived(upload.upload_id, size_bytes - offset, services.clock.now())
    return size_bytes


def _check_digest(upload: UploadRecord, told: str) -> None:
    """Refuse bytes that are said to be of another delta than the one announced."""
    if parse_digest(told) not in {None, upload.delta.sha256}:
        raise RefusedError(
            ProblemCode.DELTA_CONFLICT, "these bytes are said to be of another delta"
        )


def _block_bytes(services: Services) -> int:
    """Share the memory for blocks between all uploads, so that it does not grow with them."""
    return min(BLOCK_BYTES, _BLOCKS_BYTES // len(services.receiving))


def _check(services: Services, upload: UploadRecord) -> RunId:
    """Have a complete delta checked; tell its run."""
    fault_point("upload.complete")
    with _discarding_refused(services, upload) as part:
        return services.coordinator.intake.check(upload, part)


def _count_in(services: Services, upload: UploadRecord) -> DeltaReceipt:
    """Hand a checked delta over; this waits while a merge of its run must leave none behind."""
    with _discarding_refused(services, upload) as part:
        receipt = services.coordinator.intake.count_in(upload, part)
    services.coordinator.wake()
    return receipt


@contextmanager
def _discarding_refused(services: Services, upload: UploadRecord) -> Iterator[Path]:
    """Give the file of a complete delta; when the block refuses it, its bytes are discarded."""
    part = services.home.upload_part(upload.upload_id)
    try:
        yield part
    except RefusedError as error:
        if error.code is ProblemCode.DIGEST_MISMATCH:  # the sender may begin again
            part.unlink(missing_ok=True)
        else:
            discard(services, upload)
        raise
    finally:
        services.quota.release(upload.upload_id)


def _own_upload(services: Services, client: ClientRecord, upload_id: str) -> UploadRecord:
    upload = services.store.upload(UploadId(upload_id))
    if upload.client_id != client.client_id:
        raise NotPermittedError("this upload belongs to another client")
    return upload


def _offset_bytes(services: Services, upload: UploadRecord) -> int:
    """Tell how many bytes are here; all of them once the delta is admitted."""
    if _is_counted(services, upload):
        return upload.delta.size_bytes
    return part_size_bytes(services.home.upload_part(upload.upload_id))


def _is_counted(services: Services, upload: UploadRecord) -> bool:
    assignment = services.store.assignment(upload.assignment_id)
    return services.coordinator.intake.is_counted(assignment)


def _offset_mismatch(services: Services, upload: UploadRecord, detail: str) -> RefusedError:
    offset_bytes = _offset_bytes(services, upload)
    return RefusedWithHeadersError(
        ProblemCode.OFFSET_MISMATCH,
        f"{detail}; {offset_bytes} bytes are here",
        {routes.UPLOAD_OFFSET_HEADER: str(offset_bytes)},
    )


def _require_space(services: Services, upload: UploadRecord, offset_bytes: int) -> None:
    services.quota.grant(
        upload.upload_id,
        upload.delta.size_bytes - offset_bytes,
        free_bytes=services.free_bytes(services.home.uploads),
        now=services.clock.now(),
        is_begun=offset_bytes > 0,
    )
