"""Every error the client raises on purpose.

FedraEdgeError
├── ConfigurationError            settings or arguments cannot work
│   └── NotEnrolledError          this home is no member there
├── IdentityError                 who we are on this server cannot be read or kept
├── WrongServerError              who answers is not the server that we were told of
├── DataError                     nothing in the local data can be used
├── BackendUnavailableError       the training runtime is not installed or not usable
├── SliceError                    an assignment cannot be turned into work
├── WorkInterrupted               asked to stop while working or waiting
│   └── TrainingInterrupted       ... in the middle of training or evaluating
├── StorageError                  a local file cannot be read or written
│   └── StorageFullError          ... because disk or quota have no space left
├── MirrorTooSlowError            a mirror brings weights so slowly that others are asked
├── ServerUnreachableError        no answer, or an answer that says "not now"
│   ├── ServerFailedError         the server fails at this very request
│   ├── UnexpectedAnswerError     something answered, but not as the protocol allows
│   └── UntrustedServerError      whoever answers has no certificate that we trust
│       └── UnknownAuthorityError ... nor was this site told whom to trust
└── ServerRefusedError            the server says no; carries its problem document
    ├── NotAuthenticatedError     no session, or one that the server does not know
    ├── JoinRefusedError          a join string that does not admit, or none where one is needed
    ├── SignatureRefusedError     it is not signed by the key that the server knows
    ├── ChallengeRefusedError     a challenge that is too old, or was used before
    ├── ClientRevokedError        the membership has ended
    ├── NotPermittedError         it is not ours to ask for
    ├── NotFoundError             no such thing on the server
    ├── ProtocolMismatchError     both sides speak incompatible protocol versions
    ├── OffsetMismatchError       an upload stands at another offset
    ├── RoundClosedError          the round went on without this delta
    └── DeltaRefusedError         admission turned the delta down
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fedra_edge.protocol.problems import Problem, ProblemCode


class FedraEdgeError(Exception):
    """Base of the tree; ``remedy`` tells what to do."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


class ConfigurationError(FedraEdgeError):
    """Settings or arguments cannot work."""


class NotEnrolledError(ConfigurationError):
    """This home is no member there."""


class IdentityError(FedraEdgeError):
    """Who we are on this server cannot be read or kept."""


class WrongServerError(FedraEdgeError):
    """Who answers is not the server that a join string, or the membership, is of."""


class DataError(FedraEdgeError):
    """Nothing in the local data can be used."""


class BackendUnavailableError(FedraEdgeError):
    """The training runtime is not installed or not usable."""


class SliceError(FedraEdgeError):
    """An assignment cannot be turned into work."""


MORE_MEMORY: Final = "Free memory on this machine, or raise the limit (--memory, or the system's)."


class MemoryShortError(SliceError):
    """Not even the smallest way to train a slice fits the memory that can be used now."""


class WorkInterrupted(FedraEdgeError):  # noqa: N818 (an event, not a mistake)
    """Asked to stop while working or waiting."""


class TrainingInterrupted(WorkInterrupted):
    """Asked to stop in the middle of training or evaluating."""


class StorageError(FedraEdgeError):
    """A local file cannot be read or written."""


class StorageFullError(StorageError):
    """Disk or quota have no space left."""


class MirrorTooSlowError(FedraEdgeError):
    """A mirror brings weights so slowly that others are asked."""


class ServerUnreachableError(FedraEdgeError):
    """No answer, or one that says "not now"; ``retry_after_s`` is the server's own wish."""

    def __init__(
        self, message: str, *, remedy: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s = retry_after_s


class ServerFailedError(ServerUnreachableError):
    """The server answers, and fails at this very request; others may succeed."""


class UnexpectedAnswerError(ServerUnreachableError):
    """Something answered, but not as the protocol allows: a portal, a proxy, a wrong address."""


class UntrustedServerError(ServerUnreachableError):
    """Whoever answers has no certificate that we trust; nothing was sent."""


class UnknownAuthorityError(UntrustedServerError):
    """The certificate is of an authority that this machine was never told of."""


class NotThereError(UnexpectedAnswerError):
    """A web server that is no Fedra server does not have what was asked for."""


class ServerRefusedError(FedraEdgeError):
    """The server says no."""

    def __init__(self, problem: Problem, *, remedy: str = "") -> None:
        super().__init__(problem.detail or problem.title, remedy=remedy or problem.remedy)
        self.problem = problem


class NotAuthenticatedError(ServerRefusedError):
    """No session, or one that the server does not know."""


class JoinRefusedError(ServerRefusedError):
    """A join string that does not admit, or none where one is needed."""


class SignatureRefusedError(ServerRefusedError):
    """It is not signed by the key that the server knows."""


class ChallengeRefusedError(ServerRefusedError):
    """A challenge that is too old, was used before, or is of the server before its restart."""


class ClientRevokedError(ServerRefusedError):
    """The membership has ended: the operator removed this client, or it left."""


class NotPermittedError(ServerRefusedError):
    """It is not ours to ask for."""


class NotFoundError(ServerRefusedError):
    """No such thing on the server."""


class ProtocolMismatchError(ServerRefusedError):
    """Both sides speak incompatible protocol versions."""


class OffsetMismatchError(ServerRefusedError):
    """An upload stands at ``offset_bytes``, not where we thought."""

    def __init__(self, problem: Problem, *, offset_bytes: int = 0) -> None:
        super().__init__(problem)
        self.offset_bytes = offset_bytes


class RoundClosedError(ServerRefusedError):
    """The round went on without this delta."""


class DeltaRefusedError(ServerRefusedError):
    """Admission turned the delta down."""


REFUSALS: Final[Mapping[ProblemCode, type[ServerRefusedError]]] = MappingProxyType(
    {
        ProblemCode.MALFORMED_REQUEST: ServerRefusedError,
        ProblemCode.NOT_AUTHENTICATED: NotAuthenticatedError,
        ProblemCode.JOIN_TOKEN_INVALID: JoinRefusedError,
        ProblemCode.SIGNATURE_INVALID: SignatureRefusedError,
        ProblemCode.CHALLENGE_INVALID: ChallengeRefusedError,
        ProblemCode.CLIENT_REVOKED: ClientRevokedError,
        ProblemCode.NOT_PERMITTED: NotPermittedError,
        ProblemCode.NOT_FOUND: NotFoundError,
        ProblemCode.NOT_ASSIGNED: NotPermittedError,
        ProblemCode.ROLE_INSUFFICIENT: NotPermittedError,
        ProblemCode.STATE_CONFLICT: ServerRefusedError,
        ProblemCode.METHOD_NOT_ALLOWED: ServerRefusedError,
        ProblemCode.HTTP_MALFORMED: ServerRefusedError,
        ProblemCode.HEAD_TOO_LARGE: ServerRefusedError,
        ProblemCode.LENGTH_AMBIGUOUS: ServerRefusedError,
        ProblemCode.HOST_MALFORMED: ServerRefusedError,
        ProblemCode.PATH_MALFORMED: ServerRefusedError,
        ProblemCode.EXPECTATION_FAILED: ServerRefusedError,
        ProblemCode.ENCODING_UNSUPPORTED: ServerRefusedError,
        ProblemCode.CONTENT_TYPE_UNSUPPORTED: ServerRefusedError,
        ProblemCode.BODY_TOO_SLOW: ServerRefusedError,
        ProblemCode.REPEATED_NAME: ServerRefusedError,
        ProblemCode.TOO_MANY_REQUESTS: ServerRefusedError,
        ProblemCode.TOO_MANY_UPLOADS: ServerRefusedError,
        ProblemCode.TRANSFER_EXHAUSTED: ServerRefusedError,
        ProblemCode.PROTOCOL_MISMATCH: ProtocolMismatchError,
        ProblemCode.REQUEST_TOO_LARGE: ServerRefusedError,
        ProblemCode.RANGE_NOT_SATISFIABLE: ServerRefusedError,
        ProblemCode.ROUND_CLOSED: RoundClosedError,
        ProblemCode.DELTA_CONFLICT: DeltaRefusedError,
        ProblemCode.DELTA_TOO_LARGE: DeltaRefusedError,
        ProblemCode.OFFSET_MISMATCH: OffsetMismatchError,
        ProblemCode.DIGEST_MISMATCH: DeltaRefusedError,
        ProblemCode.TENSORS_MALFORMED: DeltaRefusedError,
        ProblemCode.TENSOR_MISSING: DeltaRefusedError,
        ProblemCode.TENSOR_UNEXPECTED: DeltaRefusedError,
        ProblemCode.TENSOR_SHAPE: DeltaRefusedError,
        ProblemCode.TENSOR_DTYPE: DeltaRefusedError,
        ProblemCode.TENSOR_NOT_FINITE: DeltaRefusedError,
        ProblemCode.NUM_EXAMPLES_IMPLAUSIBLE: DeltaRefusedError,
        ProblemCode.STORAGE_FULL: ServerRefusedError,
        ProblemCode.INTERNAL: ServerRefusedError,
    }
)
"""Which error a problem code becomes; total over the closed list of codes."""
