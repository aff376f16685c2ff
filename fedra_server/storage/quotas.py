"""How much disk the server's files take and may take, known without a look at each of them."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedra_edge.protocol.ids import UploadId
from fedra_server.config import ServerHome
from fedra_server.errors import NotGrantedError

LOGGER = logging.getLogger(__name__)

SPARE_BYTES: Final = 16 * 2**20
"""Space that uploads leave free, so that what is held can be finished and recorded."""
_MEASURED_AGAIN_S: Final = 60.0
_DOUBTED_AFTER_S: Final = 1.0
_FORGOTTEN_S: Final = 600.0
"""Who says nothing of an upload for so long has no claim to the disk; coming back, it has again."""
_REMEDY: Final = (
    "Ask the operator to free disk space, with 'fedra-server prune' for example, or to raise "
    "max_disk_bytes in the server's settings; the client tries again by itself."
)


@dataclass(frozen=True)
class DiskUse:
    """Bytes of the server's files by kind."""

    blobs: int
    deltas: int
    uploads: int

    @property
    def total(self) -> int:
        """What counts towards ``max_disk_bytes``."""
        return self.blobs + self.deltas + self.uploads


def measure_use(home: ServerHome) -> DiskUse:
    """Look at every file; a moment for each ten thousand of them."""
    return DiskUse(*(bytes_below(place) for place in (home.blobs, home.deltas, home.uploads)))


def bytes_below(directory: Path) -> int:
    """Add up a directory's files; those that vanish meanwhile count as nothing."""
    total = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    total += bytes_below(Path(entry.path))
                else:
                    total += _size_bytes(entry)
    except FileNotFoundError:
        return total
    return total


class DiskQuota:
    """Grants space to uploads; measured once a minute, and kept account of in between.

    What is granted is taken at once, so that uploads announced together cannot exceed what each
    of them alone would keep to. Results of merging are never refused; they count all the same.
    What has begun counts towards the limit until it is complete or discarded, heard of or not,
    because it will be finished.
    """

    def __init__(self, home: ServerHome, limit_bytes: int | None) -> None:
        self._home = home
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._measuring = threading.Lock()
        self._used_bytes = 0
        self._measured_at = float("-inf")
        self._awaited: dict[UploadId, tuple[int, float]] = {}
        self._refused_bytes = 0

    def grant(
        self, upload_id: UploadId, size_bytes: int, *, free_bytes: int, now: float, is_begun: bool
    ) -> None:
        """Set space aside for what is still to come of an upload.

        One that has begun is held to the disk only, not to the limit, so that it is finished.

        Raises:
            NotGrantedError: There is not so much space.
        """
        self.release(upload_id)
        self._forget_silent(now)
        shortage = self._disk_shortage(size_bytes, free_bytes, now)
        if not shortage and not is_begun:
            shortage = self._limit_shortage(size_bytes, now)
        if shortage:
            if is_begun:
                self.expect_rest(upload_id, size_bytes)
            self._tell_refused(size_bytes, shortage)
            raise NotGrantedError(f"no space for {size_bytes} bytes: {shortage}", remedy=_REMEDY)
        self._tell_taken_again(free_bytes, now)
        with self._lock:
            self._awaited[upload_id] = (size_bytes, now)

    def expect_rest(self, upload_id: UploadId, size_bytes: int) -> None:
        """Count towards the limit what is to come of an upload that began and is silent."""
        with self._lock:
            self._awaited.setdefault(upload_id, (size_bytes, float("-inf")))

    def note_arrived(self, upload_id: UploadId, arrived_bytes: int, now: float) -> None:
        """Count what came of an upload as used and no longer as awaited."""
        with self._lock:
            awaited_bytes, _ = self._awaited.pop(upload_id, (0, now))
            self._used_bytes += arrived_bytes
            if awaited_bytes > arrived_bytes:
                self._awaited[upload_id] = (awaited_bytes - arrived_bytes, now)

    def release(self, upload_id: UploadId) -> None:
        """Await no more of an upload."""
        with self._lock:
            self._awaited.pop(upload_id, None)

    def shortage(self, size_bytes: int = 1, *, free_bytes: int, now: float) -> str:
        """Say why a new upload of this size would be refused; empty when it would not."""
        self._forget_silent(now)
        of_disk = self._disk_shortage(size_bytes, free_bytes, now)
        return of_disk or self._limit_shortage(size_bytes, now)

    def _tell_refused(self, size_bytes: int, shortage: str) -> None:
        """Tell the operator when refusing begins, not of each refusal."""
        with self._lock:
            is_first = self._refused_bytes == 0
            self._refused_bytes = max(self._refused_bytes, size_bytes)
        if is_first:
            LOGGER.warning("deltas are refused for want of space: %s. %s", shortage, _REMEDY)

    def _tell_taken_again(self, free_bytes: int, now: float) -> None:
        """Tell the operator once what was refused would be taken."""
        refused_bytes = self._refused_bytes
        if refused_bytes and not self.shortage(refused_bytes, free_bytes=free_bytes, now=now):
            with self._lock:
                has_ended, self._refused_bytes = self._refused_bytes == refused_bytes, 0
            if has_ended:
                LOGGER.info("deltas are taken in again")

    def _disk_shortage(self, size_bytes: int, free_bytes: int, now: float) -> str:
        with self._lock:
            claims = self._awaited.values()
            awaited_bytes = sum(awaited for awaited, at in claims if not _is_silent(at, now))
        left_bytes = free_bytes - awaited_bytes
        is_short = size_bytes > left_bytes - SPARE_BYTES
        return f"the disk has {max(0, left_bytes)} left" if is_short else ""

    def _limit_shortage(self, size_bytes: int, now: float) -> str:
        """Compare with the limit; before it refuses, what was measured is measured again."""
        if self._limit_bytes is None:
            return ""
        taken_bytes = 0
        for trusted_s in (_MEASURED_AGAIN_S, _DOUBTED_AFTER_S):
            self._measure(now, trusted_s)
            taken_bytes = self._used_bytes + self._awaited_bytes()
            if size_bytes + taken_bytes <= self._limit_bytes:
                return ""
        return f"max_disk_bytes allows {self._limit_bytes}, of which {taken_bytes} are taken"

    def _awaited_bytes(self) -> int:
        with self._lock:
            return sum(size_bytes for size_bytes, _ in self._awaited.values())

    def _forget_silent(self, now: float) -> None:
        """Forget the uploads that nobody speaks of and of which nothing is here."""
        with self._lock:
            silent = [it for it, (_, at) in self._awaited.items() if _is_silent(at, now)]
            for upload_id in silent:
                if not self._home.upload_part(upload_id).exists():
                    del self._awaited[upload_id]

    def _measure(self, now: float, trusted_s: float) -> None:
        """Measure anew what is older than ``trusted_s``."""
        with self._measuring:
            if 0 <= now - self._measured_at < trusted_s:
                return
            used_bytes = measure_use(self._home).total
            self._measured_at = now
        with self._lock:
            self._used_bytes = used_bytes


def _is_silent(at: float, now: float) -> bool:
    return not 0 <= now - at < _FORGOTTEN_S


def _size_bytes(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
