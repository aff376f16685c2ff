"""Resumable uploads of adapter deltas, after the IETF draft for resumable uploads.

A delta is announced (POST), its bytes follow in any number of requests (PATCH), and a sender
that lost its connection asks how far it got (HEAD). An assignment has one upload at a time:
announcing other bytes for it discards those that arrived before.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
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
from fedra_server.http.announcing import read_announcement
from fedra_server.http.receiving import (
    BLOCK_BYTES,
    Patience,
    Received,
    part_size_bytes,
    receive,
)
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
    ProblemCode.NUM_EXAMPLES_IMPLAUSIBLE,
    ProblemCode.TOO_MANY_UPLOADS,
    ProblemCode.TRANSFER_EXHAUSTED,
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
    _show_alive(services, client)
    try:
        with services.store.reading():
            assignment = services.coordinator.intake.hear(client.client_id, delta)
            upload = services.store.upload_for(assignment.assignment_id, delta.sha256)
    except RefusedError:
        discard_dead_uploads_of(services, delta.id)
        raise
    services.receiving.take_over(delta.id)
    if upload is None:
        with ExitStack() as held:
            _hold(services, delta, held)
            upload = _begin_upload(services, client, delta)
    else:
        services.store.make_upload_lasting(upload.upload_id)
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
    is_last = complete == "?1"
    with ExitStack() as held:
        upload = await run_in_threadpool(_claim, services, client, upload_id, offset, held)
        _check_digest(upload, request.headers.get(routes.DIGEST_HEADER, ""))
        _check_length(request, upload.delta.size_bytes - offset)
        received = Received(offset, None)
        if offset < upload.delta.size_bytes:
            body = request.stream()
            received = await _take_bytes(services, upload, offset, body, is_last=is_last)
        if is_last:
            return await _admit(services, upload, received)
        headers = {
            routes.UPLOAD_OFFSET_HEADER: str(received.size_bytes),
            routes.UPLOAD_COMPLETE_HEADER: complete,
        }
        return Response(status_code=204, headers=headers)


@mount(
    router,
    routes.UPLOAD_WHOLE,
    *FOR_CLIENTS,
    *_ADMISSION,
    *_TENSORS,
    response_model=DeltaReceipt,
    openapi_extra={"requestBody": _BODY},
)
async def deliver(
    request: Request,
    services: ServicesHere,
    client: Caller,
    *,
    manifest_bytes: Annotated[ByteCount, Header(alias=routes.MANIFEST_LENGTH_HEADER)],
) -> Response:
    """Take a delta that nothing is here of, its announcement in front, in one request.

    What arrives before a cut is an upload like any other, to be announced and gone on with.
    """
    delta, body = await read_announcement(
        request.stream(), manifest_bytes, services.config.max_request_bytes
    )
    with ExitStack() as held:
        upload = await run_in_threadpool(_begin_whole, services, client, delta, held)
        _check_length(request, manifest_bytes + delta.size_bytes)
        received = await _take_bytes(services, upload, 0, body, is_last=True)
        return await _admit(services, upload, received)


def _hold(services: Services, delta: DeltaManifest, held: ExitStack) -> None:
    """Have an announced delta to oneself, as long as ``held`` is open."""
    if not held.enter_context(services.receiving.hold(delta.id)):
        others = services.store.uploads_of(delta.id)
        if not others:
            raise NotNowError("this delta is being announced already", retry_after_s=1)
        raise _offset_mismatch(services, others[-1], "another request is sending a delta")


def _begin_upload(
    services: Services, client: ClientRecord, delta: DeltaManifest, *, is_lasting: bool = True
) -> UploadRecord:
    """Record a new upload in place of any other of its assignment, which the caller holds."""
    for other in services.store.uploads_of(delta.id):
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
    services.store.add_upload(upload, is_lasting=is_lasting)
    fault_point("upload.created")
    return upload


def _begin_whole(
    services: Services, client: ClientRecord, delta: DeltaManifest, held: ExitStack
) -> UploadRecord:
    """Have a delta that comes in one request to oneself, and make sure that nothing of it is here.

    Its record need not be lasting: after a power cut the sender begins anew.
    """
    _show_alive(services, client)
    try:
        with services.store.reading():
            services.coordinator.intake.hear(client.client_id, delta)
    except RefusedError:
        discard_dead_uploads_of(services, delta.id)
        raise
    services.receiving.take_over(delta.id)
    _hold(services, delta, held)
    upload = _begin_upload(services, client, delta, is_lasting=False)
    services.require_allowance(upload)
    offset_bytes = _offset_bytes(services, upload)
    if offset_bytes:
        raise _offset_mismatch(services, upload, "the upload does not stand at byte 0")
    _require_space(services, upload, offset_bytes)
    return upload


def _claim(
    services: Services, client: ClientRecord, upload_id: str, offset: int, held: ExitStack
) -> UploadRecord:
    """Have an upload to oneself, as long as ``held`` is open, and make sure that bytes go there.

    The delta must still be wanted, and the bytes continue what is there.
    """
    upload = _own_upload(services, client, upload_id)
    services.require_allowance(upload)
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


def _check_length(request: Request, room_bytes: int) -> None:
    announced = request.headers.get("content-length", "0")
    if not announced.isascii() or not announced.isdigit() or int(announced) > room_bytes:
        raise RefusedError(
            ProblemCode.DELTA_TOO_LARGE,
            f"there is room for {room_bytes} bytes, the request brings {announced[:20]}",
        )


async def _take_bytes(
    services: Services,
    upload: UploadRecord,
    offset: int,
    body: AsyncIterator[bytes],
    *,
    is_last: bool,
) -> Received:
    room_bytes = upload.delta.size_bytes - offset
    part = services.home.upload_part(upload.upload_id)
    block_bytes = partial(_block_bytes, services)
    patience = Patience()
    services.receiving.end_with(upload.assignment_id, patience.end)
    received = await receive(
        part, body, room_bytes, patience, block_bytes, is_named_durably=not is_last
    )
    arrived_bytes = received.size_bytes - offset
    services.quota.note_arrived(upload.upload_id, arrived_bytes, services.clock.now())
    services.note_sent(upload, arrived_bytes)
    return received


async def _admit(services: Services, upload: UploadRecord, received: Received) -> Response:
    """Have a delta checked and counted in that should be complete now."""
    if received.size_bytes < upload.delta.size_bytes:
        raise _offset_mismatch(services, upload, "bytes are missing before the end")
    run = await to_thread.run_sync(
        _check, services, upload, received.sha256, limiter=services.checks
    )
    in_turn = services.counting[run]
    receipt = await to_thread.run_sync(_count_in, services, upload, limiter=in_turn)
    headers = {routes.UPLOAD_COMPLETE_HEADER: "?1"}
    return JSONResponse(receipt.model_dump(mode="json"), headers=headers)


def _show_alive(services: Services, client: ClientRecord) -> None:
    if services.is_sign_due(client):
        services.store.touch(client.client_id, services.clock.now())


def _check_digest(upload: UploadRecord, told: str) -> None:
    """Refuse bytes that are said to be of another delta than the one announced."""
    if parse_digest(told) not in {None, upload.delta.sha256}:
        raise RefusedError(
            ProblemCode.DELTA_CONFLICT, "these bytes are said to be of another delta"
        )


def _block_bytes(services: Services) -> int:
    """Share the memory for blocks between all uploads, so that it does not grow with them."""
    return min(BLOCK_BYTES, _BLOCKS_BYTES // len(services.receiving))


def _check(services: Services, upload: UploadRecord, sha256: str | None) -> RunId:
    """Have a complete delta checked; tell its run."""
    fault_point("upload.complete")
    with _discarding_refused(services, upload) as part:
        return services.coordinator.intake.check(upload, part, sha256)


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
        upload.client_id,
        free_bytes=services.free_bytes(services.home.uploads),
        now=services.clock.now(),
        is_begun=offset_bytes > 0,
    )
