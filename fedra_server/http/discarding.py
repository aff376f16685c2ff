"""Frees the disk of deltas that arrived in part and can no longer be admitted."""

from __future__ import annotations

import logging

from fedra_edge.protocol.ids import AssignmentId, UploadId
from fedra_server.errors import FedraServerError, NotFoundError, NotPermittedError, RefusedError
from fedra_server.http.receiving import part_size_bytes
from fedra_server.http.services import Services
from fedra_server.storage.durability import disk_errors
from fedra_server.storage.records import UploadRecord

logger = logging.getLogger(__name__)


def discard(services: Services, upload: UploadRecord) -> None:
    """Forget an upload and its bytes; the bytes first, so that none outlive the record."""
    with disk_errors("discarding an upload"):
        services.home.upload_part(upload.upload_id).unlink(missing_ok=True)
    services.store.remove_upload(upload.upload_id)
    services.quota.release(upload.upload_id)


def discard_dead_uploads(services: Services) -> None:
    """Look through all that is arriving, at the start and after each change of a round.

    What cannot be discarded now is left for the next time.
    """
    for part in services.home.uploads.glob("*.part"):
        try:
            try:
                upload = services.store.upload(UploadId(part.stem))
            except NotFoundError:
                with disk_errors("discarding an upload"):
                    part.unlink(missing_ok=True)
            else:
                _discard_if_dead(services, upload)
        except FedraServerError as error:
            logger.warning("upload %s cannot be discarded yet: %s", part.stem, error)


def discard_dead_uploads_of(services: Services, assignment_id: AssignmentId) -> None:
    """Look through what arrived for one assignment."""
    for upload in services.store.uploads_of(assignment_id):
        _discard_if_dead(services, upload)


def _discard_if_dead(services: Services, upload: UploadRecord) -> None:
    """Leave alone what a request is receiving: it meets the refusal itself."""
    with services.receiving.hold(upload.assignment_id) as is_free:
        if not is_free:
            return
        if _is_dead(services, upload):
            logger.info("discarding what arrived of upload %s", upload.upload_id)
            discard(services, upload)
        else:
            arrived_bytes = part_size_bytes(services.home.upload_part(upload.upload_id))
            rest_bytes = upload.delta.size_bytes - arrived_bytes
            services.quota.expect_rest(upload.upload_id, rest_bytes, upload.client_id)


def _is_dead(services: Services, upload: UploadRecord) -> bool:
    try:
        services.coordinator.intake.expect(upload.client_id, upload.delta)
    except (NotFoundError, NotPermittedError, RefusedError):
        return True
    return False
