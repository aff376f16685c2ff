"""The one table from what went wrong to the problem document that the caller gets."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedra_edge.protocol.problems import PROBLEM_MEDIA_TYPE, Problem, ProblemCode
from fedra_edge.protocol.version import PROTOCOL_HEADER, PROTOCOL_VERSION
from fedra_server.errors import (
    ConflictError,
    FedraServerError,
    NotAuthenticatedError,
    NotFoundError,
    NotGrantedError,
    NotPermittedError,
    RefusedError,
    StorageFullError,
)
from fedra_server.hiding import without_secrets

logger = logging.getLogger(__name__)

_MAX_FAULTS_TOLD: Final = 5
_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Answer(NamedTuple):
    """The status that goes with a code, and what to do about it."""

    status: int
    remedy: str


_RETRAIN: Final = "Nothing to do: the client sets this result aside and takes the next round."
_CHECK_WAY: Final = "Check proxies on the way; they may alter requests."
_WAIT: Final = "Wait as long as Retry-After says; a client does so by itself, and goes on."
_REINSTALL: Final = "Update the client software at this site to the version the server runs."
_OPERATORS_PATH: Final = "/v1/operator"
_CORRECT: Final = "Correct the request; /openapi.json says what it takes."
_SEEK: Final = (
    "Check the address; /openapi.json lists what there is, and what operators may ask begins with "
    f"{_OPERATORS_PATH}/."
)

ANSWERS: Final[Mapping[ProblemCode, Answer]] = {
    ProblemCode.MALFORMED_REQUEST: Answer(422, _REINSTALL),
    ProblemCode.NOT_AUTHENTICATED: Answer(
        401, "Run 'fedra-edge leave' and then 'fedra-edge join' on this machine to enrol it again."
    ),
    ProblemCode.JOIN_TOKEN_INVALID: Answer(
        403, "Ask the operator for a new join string ('fedra-server token create')."
    ),
    ProblemCode.SIGNATURE_INVALID: Answer(
        403, "Check that this machine joined with its own data folder, not a copy of another's."
    ),
    ProblemCode.CHALLENGE_INVALID: Answer(
        403, "Nothing to do: the client takes a new challenge by itself."
    ),
    ProblemCode.CLIENT_REVOKED: Answer(
        403, "Ask the operator for a new join string if this machine should take part again."
    ),
    ProblemCode.NOT_PERMITTED: Answer(
        403, "Check that this machine joined with its own data folder, not a copy of another's."
    ),
    ProblemCode.ROLE_INSUFFICIENT: Answer(
        403, "Use the credential of an operator with the role that is named."
    ),
    ProblemCode.NOT_FOUND: Answer(
        404, "Check the address and the names that were typed; ask the operator what exists."
    ),
    ProblemCode.NOT_ASSIGNED: Answer(
        403, "Nothing to do: a client reads what its work names; ask for the assignment again."
    ),
    ProblemCode.HTTP_MALFORMED: Answer(400, _CHECK_WAY),
    ProblemCode.HEAD_TOO_LARGE: Answer(431, _CHECK_WAY),
    ProblemCode.LENGTH_AMBIGUOUS: Answer(400, _CHECK_WAY),
    ProblemCode.HOST_MALFORMED: Answer(400, _CHECK_WAY),
    ProblemCode.PATH_MALFORMED: Answer(400, "Check the address given with --server."),
    ProblemCode.EXPECTATION_FAILED: Answer(417, _CHECK_WAY),
    ProblemCode.ENCODING_UNSUPPORTED: Answer(415, "Send bodies as they are, not compressed."),
    ProblemCode.CONTENT_TYPE_UNSUPPORTED: Answer(415, _REINSTALL),
    ProblemCode.BODY_TOO_SLOW: Answer(408, "Nothing to do: the client tries again by itself."),
    ProblemCode.REPEATED_NAME: Answer(422, _REINSTALL),
    ProblemCode.TOO_MANY_REQUESTS: Answer(429, _WAIT),
    ProblemCode.TOO_MANY_UPLOADS: Answer(
        429, "Finish the deltas that have begun; the client does so by itself."
    ),
    ProblemCode.TRANSFER_EXHAUSTED: Answer(429, _WAIT),
    ProblemCode.METHOD_NOT_ALLOWED: Answer(405, _SEEK),
    ProblemCode.PROTOCOL_MISMATCH: Answer(426, _REINSTALL),
    ProblemCode.REQUEST_TOO_LARGE: Answer(413, _REINSTALL),
    ProblemCode.RANGE_NOT_SATISFIABLE: Answer(
        416, "Delete the partly downloaded file; the client then fetches it from the start."
    ),
    ProblemCode.STATE_CONFLICT: Answer(409, "Look at the state of things, and ask again."),
    ProblemCode.ROUND_CLOSED: Answer(409, _RETRAIN),
    ProblemCode.DELTA_CONFLICT: Answer(409, _RETRAIN),
    ProblemCode.DELTA_TOO_LARGE: Answer(
        413, "Ask the operator to raise max_delta_bytes in the server's settings."
    ),
    ProblemCode.OFFSET_MISMATCH: Answer(
        409, "Continue sending from the byte that the Upload-Offset header names."
    ),
    ProblemCode.DIGEST_MISMATCH: Answer(
        422, "Send it again from the start; if it happens often, check cables and proxies."
    ),
    ProblemCode.TENSORS_MALFORMED: Answer(422, _REINSTALL),
    ProblemCode.TENSOR_MISSING: Answer(422, _REINSTALL),
    ProblemCode.TENSOR_UNEXPECTED: Answer(422, _REINSTALL),
    ProblemCode.TENSOR_SHAPE: Answer(422, _REINSTALL),
    ProblemCode.TENSOR_DTYPE: Answer(422, _REINSTALL),
    ProblemCode.TENSOR_NOT_FINITE: Answer(
        422, "Ask the operator to lower the run's learning rate; check this site's images."
    ),
    ProblemCode.NUM_EXAMPLES_IMPLAUSIBLE: Answer(422, _REINSTALL),
    ProblemCode.STORAGE_FULL: Answer(
        507, "Ask the operator to free disk space on the server; the client tries again by itself."
    ),
    ProblemCode.INTERNAL: Answer(
        500, "Wait and try again; if it stays, send the server's log to the operator."
    ),
}

_CODE_OF_ERROR: Final[Mapping[type[FedraServerError], ProblemCode]] = {
    NotFoundError: ProblemCode.NOT_FOUND,
    ConflictError: ProblemCode.DELTA_CONFLICT,
    StorageFullError: ProblemCode.STORAGE_FULL,
    NotAuthenticatedError: ProblemCode.NOT_AUTHENTICATED,
    NotPermittedError: ProblemCode.NOT_PERMITTED,
}

_CODE_OF_STATUS: Final[Mapping[int, ProblemCode]] = {
    404: ProblemCode.NOT_FOUND,
    405: ProblemCode.METHOD_NOT_ALLOWED,
    408: ProblemCode.BODY_TOO_SLOW,
    413: ProblemCode.REQUEST_TOO_LARGE,
}

_HEADERS_OF_CODE: Final[Mapping[ProblemCode, Mapping[str, str]]] = {
    ProblemCode.NOT_AUTHENTICATED: {"WWW-Authenticate": 'Bearer realm="fedra"'},
    ProblemCode.PROTOCOL_MISMATCH: {"Upgrade": "Fedra-Protocol"},
}


class RefusedWithHeadersError(RefusedError):
    """A refusal whose answer carries extra headers, such as the right offset."""

    def __init__(
        self, code: ProblemCode, message: str, headers: Mapping[str, str], *, remedy: str = ""
    ) -> None:
        super().__init__(code, message, remedy=remedy)
        self.headers = headers


class RefusedBodyError(HTTPException):
    """A body that cannot be taken as JSON, with the problem code for it."""

    def __init__(self, code: ProblemCode, detail: str) -> None:
        super().__init__(ANSWERS[code].status, detail)
        self.code = code


class NotNowError(FedraServerError):
    """Too much at once; the same request may succeed after ``retry_after_s``."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, remedy="Nothing to do: the client tries again by itself.")
        self.retry_after_s = retry_after_s


def problem_response(
    code: ProblemCode,
    detail: str,
    *,
    remedy: str = "",
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Build the response for a code; the table fills in status and remedy."""
    answer = ANSWERS[code]
    problem = Problem.of(
        code,
        status=status or answer.status,
        detail=without_secrets(detail),
        remedy=remedy or answer.remedy,
    )
    fixed = {"Cache-Control": "no-store", PROTOCOL_HEADER: PROTOCOL_VERSION}
    return Response(
        problem.model_dump_json(),
        problem.status,
        headers={**fixed, **_HEADERS_OF_CODE.get(code, {}), **(headers or {})},
        media_type=PROBLEM_MEDIA_TYPE,
    )


def install_problems(app: FastAPI) -> None:
    """Make every expected error leave the application as a problem document."""
    app.add_exception_handler(FedraServerError, _answer_own_error)
    app.add_exception_handler(NotNowError, _answer_not_now)
    app.add_exception_handler(RequestValidationError, _answer_malformed)
    app.add_exception_handler(HTTPException, _answer_framework_error)
    app.add_exception_handler(OSError, _answer_disk_error)


class DefectAnswer:
    """Answers what nothing else handles, inside all that holds for every response.

    Were such an error to reach the server that runs the application, it would close a
    connection that the caller was told it may use again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; an answer that has begun can only be broken off."""
        has_begun = False

        async def send_watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        except Exception as error:
            if scope["type"] != "http" or has_begun:
                raise
            answer = _answer_unexpected(Request(scope), error)
            await answer(scope, receive, send)


def code_of(error: FedraServerError) -> ProblemCode:
    """Find the code for an error of ours; whatever the table lacks is internal."""
    if isinstance(error, RefusedError):
        return error.code
    codes = (_CODE_OF_ERROR[kind] for kind in type(error).mro() if kind in _CODE_OF_ERROR)
    return next(codes, ProblemCode.INTERNAL)


async def _answer_own_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, FedraServerError):
        return _answer_unexpected(request, error)
    code = code_of(error)
    if code is ProblemCode.INTERNAL:
        return _answer_unexpected(request, error)
    headers = error.headers if isinstance(error, RefusedWithHeadersError) else None
    level = logging.DEBUG if isinstance(error, NotGrantedError) else logging.INFO
    why = without_secrets(str(error))
    logger.log(level, "%s %s refused: %s: %s", request.method, _path(request), code, why)
    return problem_response(code, str(error), remedy=error.remedy, headers=headers)


async def _answer_not_now(_request: Request, error: Exception) -> Response:
    retry_after_s = error.retry_after_s if isinstance(error, NotNowError) else 1
    return problem_response(
        ProblemCode.INTERNAL,
        str(error),
        remedy=getattr(error, "remedy", ""),
        status=HTTPStatus.SERVICE_UNAVAILABLE,
        headers={"Retry-After": str(retry_after_s)},
    )


async def _answer_malformed(request: Request, error: Exception) -> Response:
    faults = error.errors() if isinstance(error, RequestValidationError) else []
    code = ProblemCode.MALFORMED_REQUEST
    return problem_response(code, _describe_faults(faults), remedy=_remedy(request, code))


async def _answer_framework_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return _answer_unexpected(request, error)
    of_status = _CODE_OF_STATUS.get(error.status_code, ProblemCode.MALFORMED_REQUEST)
    code = error.code if isinstance(error, RefusedBodyError) else of_status
    remedy = _remedy(request, code)
    return problem_response(code, str(error.detail), remedy=remedy, headers=error.headers)


def _remedy(request: Request, code: ProblemCode) -> str:
    """Advise an operator's program in its own terms, not as if it were a client's."""
    if code is ProblemCode.NOT_FOUND:  # there is no such route
        return _SEEK
    remedy = ANSWERS[code].remedy
    is_operators = request.url.path.startswith(f"{_OPERATORS_PATH}/")
    return _CORRECT if is_operators and remedy is _REINSTALL else remedy


async def _answer_disk_error(request: Request, error: Exception) -> Response:
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        logger.error("no space left while serving %s", _path(request))
        return problem_response(ProblemCode.STORAGE_FULL, "the server's disk is full")
    return _answer_unexpected(request, error)


def _path(request: Request) -> str:
    return without_secrets(request.url.path)


def _answer_unexpected(request: Request, error: Exception) -> Response:
    """Log the error and tell the caller nothing of it."""
    logger.error("%s %s failed", request.method, _path(request), exc_info=error)
    return problem_response(ProblemCode.INTERNAL, "the server could not answer; its log says why")


def _describe_faults(faults: Sequence[Any]) -> str:
    told = [
        f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
        for fault in faults[:_MAX_FAULTS_TOLD]
    ]
    more = len(faults) - len(told)
    return "; ".join(told + ([f"and {more} more"] if more > 0 else []))
