"""Resumable uploads of adapter deltas, after the IETF draft for resumable uploads.

A delta is announced (POST), its bytes follow in any number of requests (PATCH), and a sender
that lost its connection asks how far it got (HEAD). An assignment has one upload at a time:
announcing other bytes for it discards those that arrived before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Final, Literal

from anyio import to_thread
from fastapi import APIRouter, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from fedra_edge.protocol import routes
from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.digests import parse_digest
from fedra_edge.protocol.messages import DeltaReceipt, UploadStatus
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.wire import ByteCount, Token
from fedra_server.errors import RefusedError
from fedra_server.http.announcing import read_announcement
from fedra_server.http.arriving import (
    begin_upload,
    begin_whole,
    block_bytes_of,
    check,
    claim,
    count_in,
    hold_delta,
    is_counted,
    offset_bytes_of,
    offset_mismatch,
    own_upload,
    require_space,
    show_alive,
)
from fedra_server.http.auth import Caller, SpeaksProtocol
from fedra_server.http.discarding import discard_dead_uploads_of
from fedra_server.http.mounting import FOR_CLIENTS, mount
from fedra_server.http.receiving import (
    Patience,
    Received,
    receive,
)
from fedra_server.http.services import Services, ServicesHere
from fedra_server.storage.records import UploadRecord

router = APIRouter(tags=["uploads"], dependencies=[SpeaksProtocol])

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
    show_alive(services, client)
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
            hold_delta(services, delta, held)
            upload = begin_upload(services, client, delta)
    else:
        services.store.make_upload_lasting(upload.upload_id)
    offset_bytes = offset_bytes_of(services, upload)
    require_space(services, upload, offset_bytes)
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
    upload = own_upload(services, client, upload_id)
    services.receiving.take_over(upload.assignment_id)
    is_complete = is_counted(services, upload)
    return Response(
        headers={
            routes.UPLOAD_OFFSET_HEADER: str(offset_bytes_of(services, upload)),
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
        upload = await run_in_threadpool(claim, services, client, upload_id, offset, held)
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
        upload = await run_in_threadpool(begin_whole, services, client, delta, held)
        _check_length(request, manifest_bytes + delta.size_bytes)
        received = await _take_bytes(services, upload, 0, body, is_last=True)
        return await _admit(services, upload, received)


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
    block_bytes = partial(block_bytes_of, services)
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
        raise offset_mismatch(services, upload, "bytes are missing before the end")
    run = await to_thread.run_sync(
        check, services, upload, received.sha256, limiter=services.checks
    )
    in_turn = services.counting[run]
    receipt = await to_thread.run_sync(count_in, services, upload, limiter=in_turn)
    headers = {routes.UPLOAD_COMPLETE_HEADER: "?1"}
    return JSONResponse(receipt.model_dump(mode="json"), headers=headers)


def _check_digest(upload: UploadRecord, told: str) -> None:
    """Refuse bytes that are said to be of another delta than the one announced."""
    if parse_digest(told) not in {None, upload.delta.sha256}:
        raise RefusedError(
            ProblemCode.DELTA_CONFLICT, "these bytes are said to be of another delta"
        )
