"""Problem documents (RFC 9457) and the closed list of their codes."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from fedra_edge.protocol.wire import Detail, ShortText, WireModel

PROBLEM_MEDIA_TYPE: Final = "application/problem+json"


class ProblemCode(StrEnum):
    """Every reason for which the server refuses, stable across versions."""

    MALFORMED_REQUEST = "malformed-request"
    NOT_AUTHENTICATED = "not-authenticated"
    JOIN_TOKEN_INVALID = "join-token-invalid"  # noqa: S105 (a code, no secret)
    SIGNATURE_INVALID = "signature-invalid"
    CHALLENGE_INVALID = "challenge-invalid"
    CLIENT_REVOKED = "client-revoked"
    NOT_PERMITTED = "not-permitted"
    ROLE_INSUFFICIENT = "role-insufficient"
    NOT_FOUND = "not-found"
    NOT_ASSIGNED = "not-assigned"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    HTTP_MALFORMED = "http-malformed"
    HEAD_TOO_LARGE = "head-too-large"
    LENGTH_AMBIGUOUS = "length-ambiguous"
    HOST_MALFORMED = "host-malformed"
    PATH_MALFORMED = "path-malformed"
    EXPECTATION_FAILED = "expectation-failed"
    ENCODING_UNSUPPORTED = "encoding-unsupported"
    CONTENT_TYPE_UNSUPPORTED = "content-type-unsupported"
    BODY_TOO_SLOW = "body-too-slow"
    REPEATED_NAME = "repeated-name"
    TOO_MANY_REQUESTS = "too-many-requests"
    TOO_MANY_UPLOADS = "too-many-uploads"
    TRANSFER_EXHAUSTED = "transfer-exhausted"
    PROTOCOL_MISMATCH = "protocol-mismatch"
    REQUEST_TOO_LARGE = "request-too-large"
    RANGE_NOT_SATISFIABLE = "range-not-satisfiable"
    STATE_CONFLICT = "state-conflict"
    ROUND_CLOSED = "round-closed"
    DELTA_CONFLICT = "delta-conflict"
    DELTA_TOO_LARGE = "delta-too-large"
    OFFSET_MISMATCH = "offset-mismatch"
    DIGEST_MISMATCH = "digest-mismatch"
    TENSORS_MALFORMED = "tensors-malformed"
    TENSOR_MISSING = "tensor-missing"
    TENSOR_UNEXPECTED = "tensor-unexpected"
    TENSOR_SHAPE = "tensor-shape"
    TENSOR_DTYPE = "tensor-dtype"
    TENSOR_NOT_FINITE = "tensor-not-finite"
    NUM_EXAMPLES_IMPLAUSIBLE = "num-examples-implausible"
    STORAGE_FULL = "storage-full"
    INTERNAL = "internal"


class Problem(WireModel):
    """A problem document: what went wrong in ``detail``, what to do about it in ``remedy``."""

    type: ShortText
    title: ShortText
    status: int
    code: ProblemCode
    detail: Detail
    remedy: Detail = ""

    @classmethod
    def of(cls, code: ProblemCode, *, status: int, detail: str, remedy: str = "") -> Problem:
        """Fill in what follows from the code."""
        return cls(
            type=f"urn:fedra:problem:{code}",
            title=code.replace("-", " ").capitalize(),
            status=status,
            code=code,
            detail=detail[:4000],
            remedy=remedy,
        )
