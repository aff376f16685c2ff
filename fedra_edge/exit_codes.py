"""The process exit codes of fedra-edge, stable across versions, and which error gives which."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from fedra_edge.errors import (
    BackendUnavailableError,
    ClientRevokedError,
    ConfigurationError,
    DataError,
    FedraEdgeError,
    IdentityError,
    ServerRefusedError,
    ServerUnreachableError,
    StorageError,
    WrongServerError,
)


class ExitCode(IntEnum):
    """What a caller can decide on without reading messages."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    CONFIGURATION = 3
    DATA = 4
    UNREACHABLE = 5
    REFUSED = 6
    BACKEND = 7
    STORAGE = 8
    REVOKED = 9
    WRONG_SERVER = 10


EXIT_CODES_HELP: Final = (
    "Exit codes: 0 done; 1 unexpected error; 2 wrong usage; 3 configuration cannot work; "
    "4 no usable local data; 5 server unreachable; 6 refused by the server; "
    "7 training runtime missing; 8 disk refused; 9 membership ended by the operator; "
    "10 not the server that the join string names."
)

_CODES: Final[tuple[tuple[type[FedraEdgeError], ExitCode], ...]] = (
    (ConfigurationError, ExitCode.CONFIGURATION),
    (DataError, ExitCode.DATA),
    (ServerUnreachableError, ExitCode.UNREACHABLE),
    (ClientRevokedError, ExitCode.REVOKED),
    (ServerRefusedError, ExitCode.REFUSED),
    (WrongServerError, ExitCode.WRONG_SERVER),
    (IdentityError, ExitCode.STORAGE),
    (BackendUnavailableError, ExitCode.BACKEND),
    (StorageError, ExitCode.STORAGE),
)


def exit_code_of(error: Exception) -> ExitCode:
    """Find the exit code of an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.UNEXPECTED)
