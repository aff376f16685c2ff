"""Writes small files so that a crash leaves the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedra_edge.errors import StorageError, StorageFullError

_FULL: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
)
_PRIVATE: Final = 0o600
_REPLACE: Final = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn what the operating system says of a file into our own errors, in one place."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise StorageFullError(
                f"no space is left to {action}: {reason}",
                remedy="free some disk space or choose another place with --home",
            ) from error
        raise StorageError(
            f"cannot {action}: {reason}",
            remedy="check that the directory exists and may be written to",
        ) from error


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file by new content, readable by its owner only, and wait for the disk.

    Raises:
        StorageError: The file cannot be written.
        StorageFullError: ... because no space is left.
    """
    with storage_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.new")
        try:
            descriptor = os.open(fresh, _REPLACE, _PRIVATE)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable, where the platform can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(path: Path, directory: Path) -> Path:
    """Move a file out of the way, never over another one, and give its new place."""
    with storage_errors(f"move {path} out of the way"):
        directory.mkdir(parents=True, exist_ok=True)
        target = directory / path.name
        number = 1
        while target.exists():
            target = directory / f"{path.name}.{number}"
            number += 1
        return path.replace(target)
