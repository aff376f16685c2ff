"""Deletes files that no record refers to any more, and never one that a record does."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.ids import AssignmentId
from fedra_server.clock import Clock
from fedra_server.config import ServerHome
from fedra_server.errors import FedraServerError
from fedra_server.storage.blobs import BlobStore, StoredBlob
from fedra_server.storage.durability import disk_errors, replace_durably
from fedra_server.storage.retention import Cut
from fedra_server.storage.store import Store

logger = logging.getLogger(__name__)

ORPHAN_AGE_S: Final = 86_400.0
"""What nobody refers to may be about to be referred to; after a day it is an orphan."""
_EVERY_S: Final = 3600.0
_NS: Final = 10**9
_DELTA: Final = ".safetensors"


@dataclass(frozen=True)
class Collected:
    """What went, or would go."""

    blobs: int
    deltas: int
    freed_bytes: int


@dataclass(frozen=True)
class Orphans:
    """Files that may go."""

    blobs: tuple[StoredBlob, ...]
    deltas: tuple[Path, ...]
    parts: tuple[Path, ...]

    def as_collected(self) -> Collected:
        """Sum up what would go."""
        freed_bytes = sum(blob.size_bytes for blob in self.blobs)
        freed_bytes += sum(file.stat().st_size for file in self.deltas)
        return Collected(len(self.blobs), len(self.deltas), freed_bytes)


@dataclass(frozen=True)
class Collector:
    """Looks through a home; many may do so at once, beside everybody else."""

    store: Store
    blobs: BlobStore
    home: ServerHome
    clock: Clock

    def restore(self) -> None:
        """Undo what a killed server left halfway, before anything else happens in its home.

        A delta that was moved and never recorded goes back to the uploads, so that its client,
        who was not told, need not send it again.
        """
        with disk_errors("looking through the home"):
            self.blobs.restore_aside()
            files = {path.stem: path for path in self.home.deltas.glob(f"*{_DELTA}")}
            for assignment_id in files.keys() & self.store.unrecorded_deltas():
                for upload in self.store.uploads_of(AssignmentId(assignment_id))[-1:]:
                    replace_durably(files[assignment_id], self.home.upload_part(upload.upload_id))
                    logger.info("the delta of %s waits to be admitted again", assignment_id)

    def find(self, planned: Cut | None = None) -> Orphans:
        """Name what may go, or could if a cut were made; files are listed before records are read.

        So a blob that is put and recorded meanwhile was not listed, or is younger than listed.
        """
        now = min(self.clock.now(), time.time())  # whichever way the machine's clock was set
        with disk_errors("looking through the home"):
            old = {
                blob.sha256: blob
                for blob in self.blobs.stored()
                if blob.put_at_ns < (now - ORPHAN_AGE_S) * _NS
            }
            deltas = {path.stem: path for path in self.home.deltas.glob(f"*{_DELTA}")}
            parts = [path for path in self.home.path.glob(".*.part") if _is_old(path, now)]
        for sha256 in self.store.referenced_digests(planned):
            old.pop(sha256, None)
        gone: list[Path] = []
        for assignment_id, is_needed in self.store.delta_needs(now - ORPHAN_AGE_S, planned):
            file = deltas.pop(assignment_id, None)
            if file is not None and not is_needed:
                gone.append(file)
        gone += [file for file in deltas.values() if _is_old(file, now)]
        return Orphans(tuple(old.values()), tuple(gone), tuple(parts))

    def collect(self) -> Collected:
        """Delete what may go.

        Raises:
            StorageError: Disk or database refused; what went is gone, the rest is for later.
        """
        orphans = self.find()
        blobs = deltas = freed_bytes = 0
        with disk_errors("deleting what nobody refers to"):
            self.blobs.discard_leftovers()
            for blob in orphans.blobs:
                if self.blobs.remove_unless_put(blob):
                    blobs += 1
                    freed_bytes += blob.size_bytes
                    fault_point("collect.deleted")
            for file in orphans.deltas:
                freed_bytes += _delete(file)
                deltas += 1
                fault_point("collect.deleted")
            for part in orphans.parts:
                part.unlink(missing_ok=True)
        if blobs or deltas:
            logger.info("deleted %d blobs and %d deltas, %d bytes", blobs, deltas, freed_bytes)
        return Collected(blobs, deltas, freed_bytes)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Collect now and every hour, in a thread of its own, for the length of a block."""
        stopping = threading.Event()
        thread = threading.Thread(target=self._collect_until, args=(stopping,), name="collector")
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()

    def _collect_until(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                self.collect()
            except FedraServerError as error:
                logger.warning("files that nobody refers to stay for now: %s", error)
            except Exception:
                logger.exception("files that nobody refers to stay for now, because of a defect")
            stopping.wait(_EVERY_S)


def _delete(path: Path) -> int:
    """Delete a file, unless another collector has; tell what that freed."""
    try:
        size_bytes = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size_bytes


def _is_old(path: Path, now: float) -> bool:
    try:
        return path.stat().st_mtime < now - ORPHAN_AGE_S
    except FileNotFoundError:
        return False
