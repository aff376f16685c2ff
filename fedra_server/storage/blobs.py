"""Files named by the sha256 of their content: complete and synced, or not there."""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.files import iterate_chunks
from fedra_edge.protocol.models import BlobRef
from fedra_server.errors import NotFoundError
from fedra_server.storage.durability import (
    disk_errors,
    make_directory,
    replace_durably,
    side_by_side,
    sync_directory,
)

Buffer = bytes | memoryview
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_LEFTOVER_AGE_S: Final = 86_400.0
_CHUNK_BYTES: Final = 2**20
_ASIDE: Final = ".aside"


@dataclass(frozen=True)
class StoredBlob:
    """A blob as it lay on the disk; ``put_at_ns`` is when it was last put, by the file's clock."""

    sha256: str
    size_bytes: int
    put_at_ns: int


class BlobStore:
    """A directory of blobs, ``ab/abcd...``; many processes may read and add at once.

    Bytes are written beside the blobs first and get their name only when all of them are on
    the disk, so that a blob that exists is whole whatever crashed. Putting one that is there
    makes it young again, which keeps the collector away until a record refers to it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._incoming = directory / "incoming"
        with disk_errors("opening the blobs"):
            make_directory(self._incoming)
            self._make_folders()
            self.discard_leftovers()

    def put_file(self, path: Path) -> BlobRef:
        """Copy a file in, without holding it in memory.

        Raises:
            StorageFullError: No space is left; nothing was added.
            StorageError: The file cannot be read, or the disk refused.
        """
        with disk_errors(f"storing {path.name}"):
            return self._put(iterate_chunks(path))

    def put_bytes(self, data: bytes) -> BlobRef:
        """Add bytes that are in memory already.

        Raises:
            StorageFullError: No space is left; nothing was added.
            StorageError: The disk refused.
        """
        view = memoryview(data)
        starts = range(0, len(data), _CHUNK_BYTES)
        with disk_errors("storing a blob"):
            return self._put(view[start : start + _CHUNK_BYTES] for start in starts)

    def put_all(self, files: Iterable[Iterable[Buffer]]) -> list[BlobRef]:
        """Add several at once, each in parts; they are written first, then synced side by side.

        Raises:
            StorageFullError: No space is left; what was added already may stay.
            StorageError: The disk refused.
        """
        parts: list[Path] = []
        with disk_errors("storing blobs"):
            try:
                blobs = []
                for chunks in files:
                    parts.append(self._new_part())
                    blobs.append(_write(parts[-1], chunks))
                side_by_side(_sync_file, parts)
                targets = [self._place(blob.sha256) for blob in blobs]
                for part, target in zip(parts, targets, strict=True):
                    if not _is_made_young(target):
                        _move(part, target)
                    fault_point("merge.piece")
                side_by_side(sync_directory, {target.parent for target in targets})
            finally:
                for part in parts:
                    part.unlink(missing_ok=True)
        return blobs

    def path(self, sha256: str) -> Path:
        """Give the file of a blob.

        Raises:
            NotFoundError: There is no such blob.
        """
        place = self._found(sha256)
        if place is None:
            raise NotFoundError(f"there is no blob {sha256[:64]!r}")
        return place

    def has(self, sha256: str) -> bool:
        """Tell whether a blob is here; text that is no digest is never here."""
        return self._found(sha256) is not None

    def stored(self) -> Iterator[StoredBlob]:
        """Look at every blob, in no order."""
        for path in self._directory.glob("??/*"):
            if DIGEST.fullmatch(path.name):
                try:
                    state = path.stat()
                except FileNotFoundError:
                    continue
                yield StoredBlob(path.name, state.st_size, state.st_mtime_ns)

    def remove_unless_put(self, blob: StoredBlob) -> bool:
        """Delete a blob, unless somebody has put it since it was looked at; tell whether it went.

        Nobody can put what is out of its place, so it is compared there. Whoever put it a
        moment before finds it back; whoever puts it meanwhile writes it anew.
        """
        aside = self._incoming / f"{blob.sha256}{_ASIDE}"
        try:
            self._place(blob.sha256).replace(aside)
            fault_point("collect.aside")
            if aside.stat().st_mtime_ns != blob.put_at_ns:
                self._put_back(aside)
                return False
            aside.unlink()
        except FileNotFoundError:
            return False
        return True

    def restore_aside(self) -> None:
        """Put back what a killed collector had out of its place; only a collector may ask."""
        for aside in self._incoming.glob(f"*{_ASIDE}"):
            self._put_back(aside)

    def discard_leftovers(self) -> None:
        """Remove what killed processes left of a day ago; what is younger may be in the making."""
        older_than = time.time() - _LEFTOVER_AGE_S
        for part in self._incoming.glob("*.part"):
            try:
                if part.stat().st_mtime < older_than:
                    part.unlink()
            except FileNotFoundError:
                continue

    def _make_folders(self) -> None:
        """Make all folders at once, so that no blob has to wait until its own lasts."""
        folders = [self._directory / f"{number:02x}" for number in range(256)]
        if not folders[-1].exists():
            for folder in folders:
                folder.mkdir(exist_ok=True)
            sync_directory(self._directory)

    def _found(self, sha256: str) -> Path | None:
        if not DIGEST.fullmatch(sha256):
            return None
        place = self._place(sha256)
        return place if place.is_file() else None

    def _place(self, sha256: str) -> Path:
        return self._directory / sha256[:2] / sha256

    def _put_back(self, aside: Path) -> None:
        place = self._place(aside.name.removesuffix(_ASIDE))
        replace_durably(aside, place)
        sync_directory(aside.parent)

    def _put(self, chunks: Iterable[bytes | memoryview]) -> BlobRef:
        [blob] = self.put_all([chunks])
        return blob

    def _new_part(self) -> Path:
        return self._incoming / f"{uuid.uuid4().hex}.part"


def _move(part: Path, target: Path) -> None:
    try:
        part.replace(target)
    except FileNotFoundError:  # its folder went
        make_directory(target.parent)
        part.replace(target)


def _is_made_young(path: Path) -> bool:
    """Give a file the present time; tell whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _write(path: Path, chunks: Iterable[Buffer]) -> BlobRef:
    digest = hashlib.sha256()
    size_bytes = 0
    with path.open("xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size_bytes += file.write(chunk)
    return BlobRef(sha256=digest.hexdigest(), size_bytes=size_bytes)


def _sync_file(path: Path) -> None:
    with path.open("rb+", buffering=0) as file:
        os.fsync(file.fileno())
