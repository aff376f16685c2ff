"""The records of deltas on their way."""

from __future__ import annotations

from sqlalchemy import bindparam, delete, insert, select, update

from fedra_edge.protocol.ids import AssignmentId, UploadId
from fedra_server.errors import NotFoundError
from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.records import UploadRecord
from fedra_server.storage.rows import upload_record, upload_values

_UPLOADS = tables.uploads.c
_UPLOAD = select(tables.uploads).where(_UPLOADS.upload_id == bindparam("wanted"))
_UPLOADS_OF = (
    select(tables.uploads)
    .where(_UPLOADS.assignment_id == bindparam("assignment"))
    .order_by(_UPLOADS.created_at, _UPLOADS.upload_id)
)


_ADD = insert(tables.uploads)
_TOUCH = (
    update(tables.uploads)
    .where(_UPLOADS.upload_id == bindparam("wanted"))
    .values(created_at=_UPLOADS.created_at)
)


class UploadRecords(Database):
    """Every method is one transaction."""

    def add_upload(self, record: UploadRecord, *, is_lasting: bool = True) -> None:
        """Note that a delta is announced; one that may be sent anew need not outlast a power cut.

        Raises:
            ConflictError: The upload exists, or its assignment or client does not.
        """
        with self.writing(is_lasting=is_lasting) as connection:
            connection.execute(_ADD, upload_values(record))

    def make_upload_lasting(self, upload_id: UploadId) -> None:
        """Make sure that a power cut does not undo an upload's record, however it was added."""
        with self.writing() as connection:
            connection.execute(_TOUCH, {"wanted": upload_id})

    def upload(self, upload_id: UploadId) -> UploadRecord:
        """Give an upload.

        Raises:
            NotFoundError: No such upload.
        """
        with self.reading() as connection:
            row = connection.execute(_UPLOAD, {"wanted": upload_id}).one_or_none()
        if row is None:
            raise NotFoundError(f"there is no upload {upload_id}")
        return upload_record(row)

    def upload_for(self, assignment_id: AssignmentId, sha256: str) -> UploadRecord | None:
        """Find the upload that a repeated announcement means."""
        return next((r for r in self.uploads_of(assignment_id) if r.delta.sha256 == sha256), None)

    def uploads_of(self, assignment_id: AssignmentId) -> list[UploadRecord]:
        """Give all uploads announced for an assignment, oldest first."""
        with self.reading() as connection:
            rows = connection.execute(_UPLOADS_OF, {"assignment": assignment_id}).all()
        return [upload_record(row) for row in rows]

    def remove_upload(self, upload_id: UploadId) -> None:
        """Forget an upload; forgetting it twice is no error."""
        with self.writing() as connection:
            connection.execute(delete(tables.uploads).where(_UPLOADS.upload_id == upload_id))
