"""How much disk the server's files take and may take, known without a look at each of them."""

from __future__ import annotations

import logging
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from fedra_edge.protocol.ids import ClientId, UploadId
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.config import ServerHome
from fedra_server.errors import NotGrantedError, RefusedError

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


class Claim(NamedTuple):
    """Bytes that are still to come of an upload, since when nobody spoke of it, and whose it is."""

    size_bytes: int
    at: float
    client_id: ClientId


class DiskQuota:
    """Grants space to uploads; measured once a minute, and kept account of in between.

    What is granted is taken at once, so that uploads announced together cannot exceed what each
    of them alone would keep to. Results of merging are never refused; they count all the same.
    What has begun counts towards the limit until it is complete or discarded, heard of or not,
    because it will be finished. No client has more than ``most_of_one`` uploads on their way.
    """

    def __init__(
        self, home: ServerHome, limit_bytes: int | None, most_of_one: int = sys.maxsize
    ) -> None:
        self._home = home
        self._limit_bytes = limit_bytes
        self._most_of_one = most_of_one
        self._lock = threading.Lock()
        self._measuring = threading.Lock()
        self._used_bytes = 0
        self._measured_at = float("-inf")
        self._awaited: dict[UploadId, Claim] = {}
        self._refused_bytes = 0

    def grant(
        self,
        upload_id: UploadId,
        size_bytes: int,
        client_id: ClientId,
        *,
        free_bytes: int,
        now: float,
        is_begun: bool,
    ) -> None:
        """Set space aside for what is still to come of an upload.

        One that has begun is held to the disk only, not to the limit, so that it is finished.

        Raises:
            NotGrantedError: There is not so much space.
            RefusedError: The client has too many others on their way.
        """
        self.release(upload_id)
        self._forget_silent(now)
        if not is_begun:
            self._refuse_crowd(client_id)
        shortage = self._disk_shortage(size_bytes, free_bytes, now)
        if not shortage and not is_begun:
            shortage = self._limit_shortage(size_bytes, now)
        if shortage:
            if is_begun:
                self.expect_rest(upload_id, size_bytes, client_id)
            self._tell_refused(size_bytes, shortage)
            raise NotGrantedError(f"no space for {size_bytes} bytes: {shortage}", remedy=_REMEDY)
        self._tell_taken_again(free_bytes, now)
        with self._lock:
            self._awaited[upload_id] = Claim(size_bytes, now, client_id)

    def expect_rest(self, upload_id: UploadId, size_bytes: int, client_id: ClientId) -> None:
        """Count towards the limit what is to come of an upload that began and is silent."""
        with self._lock:
            self._awaited.setdefault(upload_id, Claim(size_bytes, float("-inf"), client_id))

    def note_arrived(self, upload_id: UploadId, arrived_bytes: int, now: float) -> None:
        """Count what came of an upload as used and no longer as awaited."""
        with self._lock:
            claim = self._awaited.pop(upload_id, None)
            self._used_bytes += arrived_bytes
            if claim is not None and claim.size_bytes > arrived_bytes:
                rest_bytes = claim.size_bytes - arrived_bytes
                self._awaited[upload_id] = claim._replace(size_bytes=rest_bytes, at=now)

    def release(self, upload_id: UploadId) -> None:
        """Await no more of an upload."""
        with self._lock:
            self._awaited.pop(upload_id, None)

    def shortage(self, size_bytes: int = 1, *, free_bytes: int, now: float) -> str:
        """Say why a new upload of this size would be refused; empty when it would not."""
        self._forget_silent(now)
        of_disk = self._disk_shortage(size_bytes, free_bytes, now)
        return of_disk or self._limit_shortage(size_bytes, now)

    def _refuse_crowd(self, client_id: ClientId) -> None:
        with self._lock:
            begun = sum(claim.client_id == client_id for claim in self._awaited.values())
        if begun >= self._most_of_one:
            raise RefusedError(
                ProblemCode.TOO_MANY_UPLOADS,
                f"{begun} deltas of this client are on their way already",
            )

    def used_bytes(self, now: float) -> int:
        """Give what the server's files take, as measured within the last minute."""
        self._measure(now, _MEASURED_AGAIN_S)
        return self._used_bytes

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
            awaited_bytes = sum(it.size_bytes for it in claims if not _is_silent(it.at, now))
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
            return sum(claim.size_bytes for claim in self._awaited.values())

    def _forget_silent(self, now: float) -> None:
        """Forget the uploads that nobody speaks of and of which nothing is here."""
        with self._lock:
            silent = [it for it, claim in self._awaited.items() if _is_silent(claim.at, now)]
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
