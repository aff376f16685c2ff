"""What requests about an upload do in threads: find or begin it, have it alone, admit it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from fedra_edge.protocol import routes
from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.ids import RunId, UploadId
from fedra_edge.protocol.messages import DeltaReceipt
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.errors import NotPermittedError, RefusedError
from fedra_server.http.discarding import discard, discard_dead_uploads_of
from fedra_server.http.problems import NotNowError, RefusedWithHeadersError
from fedra_server.http.receiving import BLOCK_BYTES, part_size_bytes
from fedra_server.http.services import Services
from fedra_server.storage.records import ClientRecord, UploadRecord

_BLOCKS_BYTES: Final = 2 * 2**20
"""What all requests together may gather before they write it."""


def hold_delta(services: Services, delta: DeltaManifest, held: ExitStack) -> None:
    """Have an announced delta to oneself, as long as ``held`` is open."""
    if not held.enter_context(services.receiving.hold(delta.id)):
        others = services.store.uploads_of(delta.id)
        if not others:
            raise NotNowError("this delta is being announced already", retry_after_s=1)
        raise offset_mismatch(services, others[-1], "another request is sending a delta")


def begin_upload(
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


def begin_whole(
    services: Services, client: ClientRecord, delta: DeltaManifest, held: ExitStack
) -> UploadRecord:
    """Have a delta that comes in one request to oneself, and make sure that nothing of it is here.

    Its record need not be lasting: after a power cut the sender begins anew.
    """
    show_alive(services, client)
    try:
        with services.store.reading():
            services.coordinator.intake.hear(client.client_id, delta)
    except RefusedError:
        discard_dead_uploads_of(services, delta.id)
        raise
    services.receiving.take_over(delta.id)
    hold_delta(services, delta, held)
    upload = begin_upload(services, client, delta, is_lasting=False)
    services.require_allowance(upload)
    offset_bytes = offset_bytes_of(services, upload)
    if offset_bytes:
        raise offset_mismatch(services, upload, "the upload does not stand at byte 0")
    require_space(services, upload, offset_bytes)
    return upload


def claim(
    services: Services, client: ClientRecord, upload_id: str, offset: int, held: ExitStack
) -> UploadRecord:
    """Have an upload to oneself, as long as ``held`` is open, and make sure that bytes go there.

    The delta must still be wanted, and the bytes continue what is there.
    """
    upload = own_upload(services, client, upload_id)
    services.require_allowance(upload)
    services.receiving.take_over(upload.assignment_id)
    if not held.enter_context(services.receiving.hold(upload.assignment_id)):
        raise offset_mismatch(services, upload, "another request is sending this delta")
    try:
        with services.store.reading():
            services.coordinator.intake.expect(upload.client_id, upload.delta)
            offset_bytes = offset_bytes_of(services, upload)
    except RefusedError:
        discard(services, upload)
        raise
    if offset != offset_bytes:
        raise offset_mismatch(services, upload, f"the upload does not stand at byte {offset}")
    return upload


def show_alive(services: Services, client: ClientRecord) -> None:
    """Note a sign of life."""
    if services.is_sign_due(client):
        services.store.touch(client.client_id, services.clock.now())


def block_bytes_of(services: Services) -> int:
    """Share the memory for blocks between all uploads, so that it does not grow with them."""
    return min(BLOCK_BYTES, _BLOCKS_BYTES // len(services.receiving))


def check(services: Services, upload: UploadRecord, sha256: str | None) -> RunId:
    """Have a complete delta checked; tell its run."""
    fault_point("upload.complete")
    with _discarding_refused(services, upload) as part:
        return services.coordinator.intake.check(upload, part, sha256)


def count_in(services: Services, upload: UploadRecord) -> DeltaReceipt:
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


def own_upload(services: Services, client: ClientRecord, upload_id: str) -> UploadRecord:
    """Find an upload, of this client only."""
    upload = services.store.upload(UploadId(upload_id))
    if upload.client_id != client.client_id:
        raise NotPermittedError("this upload belongs to another client")
    return upload


def offset_bytes_of(services: Services, upload: UploadRecord) -> int:
    """Tell how many bytes are here; all of them once the delta is admitted."""
    if is_counted(services, upload):
        return upload.delta.size_bytes
    return part_size_bytes(services.home.upload_part(upload.upload_id))


def is_counted(services: Services, upload: UploadRecord) -> bool:
    """Tell whether its delta is in already."""
    assignment = services.store.assignment(upload.assignment_id)
    return services.coordinator.intake.is_counted(assignment)


def offset_mismatch(services: Services, upload: UploadRecord, detail: str) -> RefusedError:
    """Say why bytes are not taken, and where the upload stands."""
    offset_bytes = offset_bytes_of(services, upload)
    return RefusedWithHeadersError(
        ProblemCode.OFFSET_MISMATCH,
        f"{detail}; {offset_bytes} bytes are here",
        {routes.UPLOAD_OFFSET_HEADER: str(offset_bytes)},
    )


def require_space(services: Services, upload: UploadRecord, offset_bytes: int) -> None:
    """Set space aside for what is still to come, or refuse it."""
    services.quota.grant(
        upload.upload_id,
        upload.delta.size_bytes - offset_bytes,
        upload.client_id,
        free_bytes=services.free_bytes(services.home.uploads),
        now=services.clock.now(),
        is_begun=offset_bytes > 0,
    )
