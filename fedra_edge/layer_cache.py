"""Files named by their content, kept on disk within a quota and downloaded when missing."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedra_edge.durable_files import set_aside, storage_errors, sync_directory
from fedra_edge.errors import StorageFullError, UnexpectedAnswerError
from fedra_edge.protocol.files import sha256_of_file
from fedra_edge.protocol.models import BlobRef

LOGGER: Final = logging.getLogger(__name__)
_PART: Final = ".part"
_FOREIGN: Final = "foreign"
_MAX_DAMAGED: Final = 2
_STAMP_STEP_NS: Final = 1000


@dataclass(frozen=True)
class _Held:
    path: Path
    size_bytes: int
    used_ns: int


class LayerCache:
    """Gives the local file of a blob, verified by its sha256 once per process.

    Args:
        directory: Where files live, as ``ab/abcd...``; sites may copy files in by hand.
        quota_bytes: The most that all files together may occupy.
        fetch: Completes the given file with the blob's bytes, from where it stands.
    """

    def __init__(
        self, directory: Path, quota_bytes: int, fetch: Callable[[BlobRef, Path], None]
    ) -> None:
        self._directory = directory
        self._quota_bytes = quota_bytes
        self._fetch = fetch
        self._verified: set[str] = set()
        self._pinned: set[Path] = set()
        self._is_holding = False
        self._lock = threading.RLock()
        self._stamp_ns = 0

    def path(self, ref: BlobRef, /) -> Path:
        """Give the verified local file, after a download when it is not there.

        Raises:
            StorageFullError: Disk or quota cannot take it beside what is in use.
            UnexpectedAnswerError: The server repeatedly sends other bytes than it names.
        """
        with self._lock:
            path = self._place(ref.sha256)
            if not self._is_sound(path, ref):
                self._download(path, ref)
            self._touch(path)
            if self._is_holding:
                self._pinned.add(path)
            return path

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Keep every file that is asked for inside this block until the block ends."""
        self._is_holding = True
        try:
            yield
        finally:
            self._is_holding = False
            self._pinned.clear()

    @property
    def used_bytes(self) -> int:
        """What all files together occupy, unfinished downloads included."""
        return sum(held.size_bytes for held in self._listing())

    def _place(self, sha256: str) -> Path:
        return self._directory / sha256[:2] / sha256

    def _is_sound(self, path: Path, ref: BlobRef) -> bool:
        with storage_errors(f"read {path}"):
            if not path.is_file():
                return False
            is_known = ref.sha256 in self._verified
            if path.stat().st_size == ref.size_bytes and (
                is_known or sha256_of_file(path) == ref.sha256
            ):
                self._verified.add(ref.sha256)
                return True
            LOGGER.warning("cached file %s is damaged; fetching it again", path.name[:12])
            self._verified.discard(ref.sha256)
            path.unlink()
            return False

    def _download(self, path: Path, ref: BlobRef) -> None:
        part = path.with_name(path.name + _PART)
        with storage_errors(f"create {path.parent}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._clear(path)
        self._clear(part)
        self._make_room(ref.size_bytes, part)
        for _ in range(_MAX_DAMAGED):
            self._fetch(ref, part)
            with storage_errors(f"keep {path}"):
                if part.stat().st_size == ref.size_bytes and sha256_of_file(part) == ref.sha256:
                    part.replace(path)
                    sync_directory(path.parent)
                    self._verified.add(ref.sha256)
                    return
                part.unlink()
            LOGGER.warning("downloaded file %s has another digest", path.name[:12])
        raise UnexpectedAnswerError(
            f"the bytes received for {ref.sha256[:12]} are not the bytes it names",
            remedy="a proxy on the way may change downloads; exempt the server from it",
        )

    def _clear(self, place: Path) -> None:
        """Move away what is no file, a directory above all; it may be somebody's."""
        with storage_errors(f"look at {place}"):
            is_free = place.is_file() or not place.exists()
        if not is_free:
            aside = set_aside(place, self._directory / _FOREIGN)
            LOGGER.warning("%s is no file and was moved to %s", place, aside)

    def _make_room(self, needed_bytes: int, part: Path) -> None:
        """Evict what was used least recently until so many more bytes fit the quota."""
        others = [held for held in self._listing() if held.path != part]
        excess_bytes = sum(held.size_bytes for held in others) + needed_bytes - self._quota_bytes
        for held in sorted(others, key=lambda held: held.used_ns):
            if excess_bytes <= 0:
                return
            if held.path not in self._pinned and _unlink(held.path):
                LOGGER.debug("evicted %s", held.path.name[:12])
                excess_bytes -= held.size_bytes
        if excess_bytes > 0:
            raise StorageFullError(
                f"the cache quota of {self._quota_bytes} bytes is {excess_bytes} bytes too small "
                "for this work",
                remedy="allow more with FEDRA_EDGE_DISK_QUOTA_BYTES",
            )

    def _touch(self, path: Path) -> None:
        self._stamp_ns = max(time.time_ns(), self._stamp_ns + _STAMP_STEP_NS)
        with contextlib.suppress(OSError):
            os.utime(path, ns=(self._stamp_ns, self._stamp_ns))

    def _listing(self) -> list[_Held]:
        held = []
        for path in self._directory.glob("??/*"):
            with contextlib.suppress(OSError):
                state = path.stat()
                held.append(_Held(path, state.st_size, state.st_mtime_ns))
        return held


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:  # still mapped by this process, on Windows
        return False
    return True
