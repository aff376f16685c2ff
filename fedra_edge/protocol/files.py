"""Bytes of files, in bounded chunks, and their digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_CHUNK_BYTES: Final = 2**20


def sha256_of_file(path: Path) -> str:
    """Digest a file without holding it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def iterate_chunks(path: Path, start: int = 0, size_bytes: int | None = None) -> Iterator[bytes]:
    """Yield a file's bytes from ``start``, at most ``size_bytes`` of them, in bounded chunks."""
    remaining = path.stat().st_size - start if size_bytes is None else size_bytes
    with path.open("rb") as file:
        file.seek(start, os.SEEK_SET)
        while remaining > 0 and (chunk := file.read(min(_CHUNK_BYTES, remaining))):
            remaining -= len(chunk)
            yield chunk
