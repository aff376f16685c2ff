"""The process exit codes of fedra-server, stable across versions, and which error gives which."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from fedra_server.errors import (
    ConfigurationError,
    ConflictError,
    FedraServerError,
    NotFoundError,
    StorageError,
)


class ExitCode(IntEnum):
    """What a caller can decide on without reading messages."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    CONFIGURATION = 3
    NOT_FOUND = 4
    CONFLICT = 5
    STORAGE = 6
    AUDIT = 7


EXIT_CODES_HELP: Final = (
    "Exit codes: 0 done; 1 unexpected error; 2 wrong usage; 3 configuration cannot work; "
    "4 no such thing; 5 conflict with what exists; 6 disk or database refused; "
    "7 an audit found something broken."
)

_CODES: Final[tuple[tuple[type[FedraServerError], ExitCode], ...]] = (
    (ConfigurationError, ExitCode.CONFIGURATION),
    (NotFoundError, ExitCode.NOT_FOUND),
    (ConflictError, ExitCode.CONFLICT),
    (StorageError, ExitCode.STORAGE),
)


def exit_code_of(error: FedraServerError) -> ExitCode:
    """Find the exit code of an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.UNEXPECTED)
