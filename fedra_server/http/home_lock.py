"""Makes sure that one home is served by one process, because the coordinator writes alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from typing import Final

from fedra_server.config import ServerHome
from fedra_server.errors import ConfigurationError
from fedra_server.storage.durability import disk_errors

_LOCK_FILE: Final = "server.lock"


@contextmanager
def sole_server(home: ServerHome) -> Iterator[None]:
    """Hold a home's lock; the operating system lets go of it when the process dies.

    Raises:
        ConfigurationError: Another process serves this home.
    """
    with disk_errors("opening the server's home"):
        file = (home.path / _LOCK_FILE).open("ab", buffering=0)
    with file:
        try:
            _lock(file)
        except OSError as error:
            raise ConfigurationError(
                f"another fedra-server serves {home.path} already",
                remedy="Stop that server first, or use another home directory for this one.",
            ) from error
        yield


def _lock(file: FileIO) -> None:
    if sys.platform == "win32":
        import msvcrt

        file.seek(0, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
