"""Every error the server raises on purpose.

FedraServerError
├── ConfigurationError      the operator's settings or command cannot work
├── NotFoundError           no such client, model, run, revision, blob ...
├── ConflictError           it exists already, or its state does not allow this
├── StorageError            disk or database refused
│   └── StorageFullError    ... because no space is left
│       └── NotGrantedError  ... for an upload, before it begins
├── NotAuthenticatedError   no credential, or a wrong one
├── NotPermittedError       a known client asks for what is not its own
└── RefusedError            a request or delta breaks a rule; carries the problem code
"""

from __future__ import annotations

from fedra_edge.protocol.problems import ProblemCode


class FedraServerError(Exception):
    """Base of the tree; ``remedy`` tells what to do."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class ConfigurationError(FedraServerError):
    """The operator's settings or command cannot work."""


class NotFoundError(FedraServerError):
    """No such thing."""


class ConflictError(FedraServerError):
    """It exists already, or its state does not allow this."""


class StorageError(FedraServerError):
    """Disk or database refused."""


class StorageFullError(StorageError):
    """No space is left."""


class NotGrantedError(StorageFullError):
    """No space is set aside for an upload; told when that begins and ends, not each time."""


class NotAuthenticatedError(FedraServerError):
    """No credential, or a wrong one."""


class NotPermittedError(FedraServerError):
    """A known client asks for what is not its own."""


class RefusedError(FedraServerError):
    """A request or delta breaks a rule of the protocol."""

    def __init__(self, code: ProblemCode, message: str, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.code = code
