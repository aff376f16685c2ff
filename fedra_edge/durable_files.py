"""Writes small files so that a crash leaves the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal

from fedra_edge.errors import StorageError, StorageFullError
from fedra_edge.protocol.wire import WireModel

LOGGER: Final = logging.getLogger(__name__)
_FULL: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
)
_PRIVATE: Final = 0o600
UNFINISHED: Final = ".new"
"""How the name of a file ends that a process which was killed had not written to its end."""

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
    write_parts_durably(path, [content])


def write_parts_durably(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Do the same with content that comes in parts, of which one at a time is held.

    Raises:
        StorageError: The file cannot be written.
        StorageFullError: ... because no space is left.
    """
    write_synced(path, parts)
    with storage_errors(f"write {path}"):
        sync_directory(path.parent)


def write_synced(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Do the same, but for the file's name, which lasts when its directory is synced.

    Raises:
        StorageError: The file cannot be written.
        StorageFullError: ... because no space is left.
    """
    with storage_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}{UNFINISHED}")
        try:
            descriptor = os.open(fresh, _REPLACE, _PRIVATE)
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable, where the platform can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StateFile(WireModel):
    """What every JSON file of a home says first; one of a later version is not understood."""

    version: Literal[1] = 1


def clear_place(path: Path, directory: Path) -> None:
    """Move what is no file out of the way of one; it may be somebody's."""
    with storage_errors(f"look at {path}"):
        is_free = path.is_file() or not path.exists()
    if not is_free:
        LOGGER.warning("%s is no file and was moved to %s", path, set_aside(path, directory))


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


def remove_durably(*paths: Path) -> None:
    """Remove files of one directory, what killed processes left of them too, for good.

    Raises:
        StorageError: One of them cannot be removed.
    """
    for path in paths:
        with storage_errors(f"remove {path}"):
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}{UNFINISHED}").unlink(missing_ok=True)
            if path.parent.is_dir():
                sync_directory(path.parent)
