"""Files named by the sha256 of their content: complete and synced, or not there."""

from __future__ import annotations

import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from fedra_edge.protocol.files import iterate_chunks
from fedra_edge.protocol.models import BlobRef
from fedra_server.errors import NotFoundError
from fedra_server.storage.durability import disk_errors, make_directory, replace_durably

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LEFTOVER_AGE_S: Final = 86_400.0
_CHUNK_BYTES: Final = 2**20


class BlobStore:
    """A directory of blobs, ``ab/abcd...``; many processes may read and add at once.

    Bytes are written beside the blobs first and get their name only when all of them are on
    the disk, so that a blob that exists is whole whatever crashed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._incoming = directory / "incoming"
        with disk_errors("opening the blobs"):
            make_directory(self._incoming)
            self._discard_leftovers()

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

    def path(self, sha256: str) -> Path:
        """Give the file of a blob.

        Raises:
            NotFoundError: There is no such blob.
        """
        if not self.has(sha256):
            raise NotFoundError(f"there is no blob {sha256[:64]!r}")
        return self._place(sha256)

    def has(self, sha256: str) -> bool:
        """Tell whether a blob is here; text that is no digest is never here."""
        return bool(_DIGEST.fullmatch(sha256)) and self._place(sha256).is_file()

    def _place(self, sha256: str) -> Path:
        return self._directory / sha256[:2] / sha256

    def _put(self, chunks: Iterable[bytes | memoryview]) -> BlobRef:
        part = self._incoming / f"{uuid.uuid4().hex}.part"
        try:
            blob = _write_synced(part, chunks)
            target = self._place(blob.sha256)
            if not target.is_file():
                make_directory(target.parent)
                replace_durably(part, target)
        finally:
            part.unlink(missing_ok=True)
        return blob

    def _discard_leftovers(self) -> None:
        for part in self._leftovers(older_than=time.time() - _LEFTOVER_AGE_S):
            part.unlink(missing_ok=True)

    def _leftovers(self, older_than: float) -> Iterator[Path]:
        """Find what a killed process left; a younger file may belong to one at work."""
        for part in self._incoming.glob("*.part"):
            try:
                if part.stat().st_mtime < older_than:
                    yield part
            except FileNotFoundError:
                continue


def _write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> BlobRef:
    digest = hashlib.sha256()
    size_bytes = 0
    with path.open("xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size_bytes += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return BlobRef(sha256=digest.hexdigest(), size_bytes=size_bytes)
