"""How much disk the server's files take and may take, known without a look at each of them."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedra_edge.protocol.ids import UploadId
from fedra_server.config import ServerHome
from fedra_server.errors import StorageFullError

SPARE_BYTES: Final = 16 * 2**20
"""Space that uploads leave free, so that what is held can be finished and recorded."""
_MEASURED_AGAIN_S: Final = 60.0
_DOUBTED_AFTER_S: Final = 1.0
_FORGOTTEN_S: Final = 600.0
"""Who says nothing of an upload for so long has no claim to space; coming back, it has again."""
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
    """

    def __init__(self, home: ServerHome, limit_bytes: int | None) -> None:
        self._home = home
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._measuring = threading.Lock()
        self._used_bytes = 0
        self._measured_at = float("-inf")
        self._awaited: dict[UploadId, tuple[int, float]] = {}

    def grant(
        self, upload_id: UploadId, size_bytes: int, *, free_bytes: int, now: float, is_begun: bool
    ) -> None:
        """Set space aside for what is still to come of an upload.

        One that has begun is held to the disk only, not to the limit, so that it is finished.

        Raises:
            StorageFullError: There is not so much space.
        """
        self.release(upload_id)
        shortage = self._disk_shortage(size_bytes, free_bytes)
        if not shortage and not is_begun:
            shortage = self._limit_shortage(size_bytes, now)
        if shortage:
            raise StorageFullError(f"no space for {size_bytes} bytes: {shortage}", remedy=_REMEDY)
        with self._lock:
            self._awaited[upload_id] = (size_bytes, now)

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

    def shortage(self, *, free_bytes: int, now: float) -> str:
        """Say why even a small upload would be refused; empty when it would not."""
        return self._disk_shortage(1, free_bytes) or self._limit_shortage(1, now)

    def _disk_shortage(self, size_bytes: int, free_bytes: int) -> str:
        left_bytes = free_bytes - self._awaited_bytes()
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

    def _measure(self, now: float, trusted_s: float) -> None:
        """Measure anew what is older than ``trusted_s``, and forget who fell silent."""
        with self._measuring:
            if 0 <= now - self._measured_at < trusted_s:
                return
            used_bytes = measure_use(self._home).total
            self._measured_at = now
        with self._lock:
            self._used_bytes = used_bytes
            silent = [it for it, (_, at) in self._awaited.items() if now - at >= _FORGOTTEN_S]
            for upload_id in silent:
                del self._awaited[upload_id]


def _size_bytes(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
