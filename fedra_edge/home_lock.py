"""Makes sure that one home serves one client at a time; a killed client's lock ends with it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedra_edge.durable_files import clear_place, storage_errors
from fedra_edge.errors import ConfigurationError

FILE_NAME: Final = "lock"


@contextlib.contextmanager
def home_lock(home: Path) -> Iterator[None]:
    """Hold the lock of a home while the block lasts.

    Raises:
        ConfigurationError: Another client uses this home.
        StorageError: The home cannot be written to.
    """
    with storage_errors(f"use {home}"):
        home.mkdir(parents=True, exist_ok=True)
        clear_place(home / FILE_NAME, home / "damaged")
        descriptor = os.open(home / FILE_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if not _take(descriptor):
            raise ConfigurationError(
                f"another client is running with the home {home}",
                remedy="stop it first, or give this one a home of its own with --home",
            )
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
