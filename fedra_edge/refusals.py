"""Turns an answer that is no success, or none of ours, into the error that it stands for."""

from __future__ import annotations

import contextlib
from typing import Final

import httpx
from pydantic import ValidationError

from fedra_edge.errors import (
    REFUSALS,
    FedraEdgeError,
    NotThereError,
    OffsetMismatchError,
    ServerFailedError,
    ServerUnreachableError,
    UnexpectedAnswerError,
)
from fedra_edge.network_errors import CHECK_PROXY
from fedra_edge.protocol.problems import Problem, ProblemCode
from fedra_edge.protocol.routes import UPLOAD_OFFSET_HEADER
from fedra_edge.protocol.wire import byte_count_of

_BAD_REQUEST: Final = 400
_NOT_FOUND: Final = 404
_FAILED: Final = 500
_WHO_ARE_YOU: Final = 407
_NOT_NOW: Final = frozenset({408, 425, 429})
WRONG_ADDRESS: Final = (
    "check that --server is the address of a Fedra server, not of a proxy or portal"
)
_WANTS_TLS: Final = (
    "the server seems to speak https only; try https:// instead of http://, with the join string "
    "that headquarters gives out"
)
_MOST_QUOTED: Final = 200
_OWN_REMEDIES: Final = {
    ProblemCode.CLIENT_REVOKED: "headquarters has ended the membership of this site; if it should "
    "take part again, ask for a new join string, run `fedra-edge leave`, and join with it. "
    "Deltas that were not sent stay in this home's outbox",
}
_REMEDIES: Final = {
    ProblemCode.NOT_AUTHENTICATED: "run `fedra-edge leave` to drop the identity that this "
    "server does not know, then join with a join string",
    ProblemCode.PROTOCOL_MISMATCH: "install the client release that belongs to this server",
}


def check_encoding(response: httpx.Response) -> None:
    """Refuse compressed answers: nobody asked for them, and they may unfold to any size."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding.strip().lower() not in {"", "identity"}:
        raise UnexpectedAnswerError(
            f"the answer is encoded as {encoding[:20]}, which was not asked for",
            remedy="a proxy on the way may change answers; exempt the server from it",
        )


def _parse_problem(response: httpx.Response, body: bytes) -> Problem | None:
    with contextlib.suppress(ValidationError):
        if "json" in response.headers.get("content-type", ""):
            return Problem.model_validate_json(body)
    return None


def refusal_of(response: httpx.Response, body: bytes) -> FedraEdgeError:
    """Give the error that a refusing answer stands for."""
    problem = _parse_problem(response, body)
    status = response.status_code
    detail = problem.detail if problem else f"HTTP status {status}"
    if response.is_server_error or status in _NOT_NOW:
        kind = ServerFailedError if status == _FAILED else ServerUnreachableError
        return kind(
            f"the server cannot do this now: {detail}",
            remedy=problem.remedy if problem else "",
            retry_after_s=_retry_after_s(response),
        )
    if response.has_redirect_location:
        return UnexpectedAnswerError(
            f"the address redirects to {response.headers['location']}",
            remedy="give the final address as --server",
        )
    if problem is None:
        return _error_without_problem(response, body)
    if problem.code is ProblemCode.OFFSET_MISMATCH:
        offset = byte_count_of(response.headers.get(UPLOAD_OFFSET_HEADER, ""))
        return OffsetMismatchError(problem, offset_bytes=offset or 0)
    remedy = _OWN_REMEDIES.get(problem.code) or problem.remedy or _REMEDIES.get(problem.code, "")
    return REFUSALS[problem.code](problem, remedy=remedy)


def _error_without_problem(response: httpx.Response, body: bytes) -> FedraEdgeError:
    status = response.status_code
    text = body.decode("ascii", "replace")
    remedy = CHECK_PROXY if status == _WHO_ARE_YOU else WRONG_ADDRESS
    if status == _BAD_REQUEST and response.url.scheme == "http" and "https" in text.lower():
        remedy = _WANTS_TLS
    kind = NotThereError if status == _NOT_FOUND else UnexpectedAnswerError
    said = _quoted(text) if "text/plain" in response.headers.get("content-type", "") else ""
    return kind(f"HTTP status {status} without a problem document{said}", remedy=remedy)


def _quoted(text: str) -> str:
    """Repeat the first line of what somebody says, and nothing that a terminal obeys."""
    line = text.strip().partition("\n")[0][:_MOST_QUOTED]
    return f": {line!r}" if line else ""


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else None
