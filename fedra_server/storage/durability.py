"""Getting bytes safely onto the disk, and saying clearly when the disk refuses."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedra_server.errors import StorageError, StorageFullError

FULL_REMEDY: Final = "Free some space on the server's disk; nothing that was accepted is lost."
_SYNCING: Final = ThreadPoolExecutor(8, thread_name_prefix="sync")
"""Threads that wait for the disk; they begin when first needed, and stay."""
_FULL_ERRNOS: Final = {errno.ENOSPC, errno.EDQUOT}
_FULL_WINERRORS: Final = {39, 112}  # ERROR_HANDLE_DISK_FULL, ERROR_DISK_FULL


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that says what was being done.

    Raises:
        StorageFullError: No space is left.
        StorageError: The disk refused for another reason.
    """
    try:
        yield
    except OSError as error:
        winerror = getattr(error, "winerror", None)
        if error.errno in _FULL_ERRNOS or winerror in _FULL_WINERRORS:
            message = f"{what}: no space left on the disk"
            raise StorageFullError(message, remedy=FULL_REMEDY) from error
        raise StorageError(f"{what}: {error}") from error


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut; Windows keeps them by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def side_by_side(sync: Callable[[Path], None], paths: Collection[Path]) -> None:
    """Sync several files or directories at once, which the disk joins where it can."""
    if len(paths) == 1:
        sync(*paths)
        return
    for _ in _SYNCING.map(sync, paths):
        pass


def make_directory(directory: Path) -> None:
    """Make a directory and its missing parents so that they survive a power cut."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def replace_durably(source: Path, target: Path) -> None:
    """Move a synced file to its final name in one step that survives a power cut."""
    source.replace(target)
    sync_directory(target.parent)


def write_durably(path: Path, data: bytes, *, is_private: bool = False) -> None:
    """Write a whole file so that, after a crash, it is there completely or not at all.

    A private one is never readable by others, not even while it is written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb", opener=_open_private if is_private else None) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace_durably(part, path)
    finally:
        part.unlink(missing_ok=True)


def make_private(path: Path) -> None:
    """Make an empty file for its owner only, unless there is one."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def is_owners_only(path: Path) -> bool:
    """Tell whether others may neither read nor write a file; on Windows this is not known."""
    return path.stat().st_mode & 0o077 == 0


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
