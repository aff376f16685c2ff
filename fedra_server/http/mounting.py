"""Mounts a handler at a route of the wire contract and documents what it may refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypedDict, TypeVar, Unpack

from fastapi import APIRouter, Response
from fastapi.params import Depends
from pydantic import BaseModel

from fedra_edge.protocol.problems import PROBLEM_MEDIA_TYPE, Problem, ProblemCode
from fedra_edge.protocol.routes import Route
from fedra_edge.protocol.version import PROTOCOL_HEADER, PROTOCOL_VERSION
from fedra_server.http.plainness import PlainRoute
from fedra_server.http.problems import ANSWERS


class MountOptions(TypedDict, total=False):
    """What a route may set besides; FastAPI's own names."""

    status_code: int
    response_class: type[Response]
    response_model: type[BaseModel]
    openapi_extra: dict[str, Any]
    dependencies: Sequence[Depends]


EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])

_PROBLEM_REF: Final = "#/components/schemas/Problem"
_SPOKEN_VERSIONS: Final = {
    "type": "string",
    "pattern": rf"^{PROTOCOL_VERSION.partition('.')[0]}(\.|$)",
    "examples": [PROTOCOL_VERSION],
}
_FOR_EVERYONE: Final = (
    ProblemCode.MALFORMED_REQUEST,
    ProblemCode.REQUEST_TOO_LARGE,
    ProblemCode.HTTP_MALFORMED,
    ProblemCode.HEAD_TOO_LARGE,
    ProblemCode.LENGTH_AMBIGUOUS,
    ProblemCode.HOST_MALFORMED,
    ProblemCode.PATH_MALFORMED,
    ProblemCode.EXPECTATION_FAILED,
    ProblemCode.ENCODING_UNSUPPORTED,
    ProblemCode.CONTENT_TYPE_UNSUPPORTED,
    ProblemCode.BODY_TOO_SLOW,
    ProblemCode.REPEATED_NAME,
    ProblemCode.TOO_MANY_REQUESTS,
    ProblemCode.INTERNAL,
)
"""What any request may be answered by; most of these are written by those before the handlers."""
FOR_CLIENTS: Final = (
    ProblemCode.NOT_AUTHENTICATED,
    ProblemCode.CLIENT_REVOKED,
    ProblemCode.PROTOCOL_MISMATCH,
)
"""What any route for enrolled clients may refuse."""


def mount(
    router: APIRouter,
    route: Route,
    *refuses: ProblemCode,
    responses: Mapping[int | str, dict[str, Any]] = MappingProxyType({}),
    **options: Unpack[MountOptions],
) -> Callable[[EndpointT], EndpointT]:
    """Serve a route with the decorated handler."""

    def decorate(handler: EndpointT) -> EndpointT:
        router.add_api_route(
            route.path,
            handler,
            methods=[route.method],
            responses=_document(*_FOR_EVERYONE, *refuses) | dict(responses),
            route_class_override=PlainRoute,
            **options,
        )
        return handler

    return decorate


def complete_document(document: dict[str, Any]) -> None:
    """Say in an OpenAPI document what the framework cannot know.

    Problems have a media type of their own. The protocol header is required and has a form,
    though what is wrong with it is answered by a problem of its own, not as a malformed request.
    """
    for path in document.get("paths", {}).values():
        for operation in path.values():
            for response in operation["responses"].values():
                _name_problem_media_type(response.get("content", {}))
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == PROTOCOL_HEADER:
                    parameter |= {"required": True, "schema": _SPOKEN_VERSIONS}


def _name_problem_media_type(content: dict[str, Any]) -> None:
    for media_type, body in list(content.items()):
        if body.get("schema", {}).get("$ref") == _PROBLEM_REF:
            content[PROBLEM_MEDIA_TYPE] = content.pop(media_type)


def _document(*codes: ProblemCode) -> dict[int | str, dict[str, Any]]:
    names: dict[int, list[str]] = {}
    for code in codes:
        names.setdefault(ANSWERS[code].status, []).append(code)
    return {
        status: {"model": Problem, "description": f"Problem: {', '.join(sorted(set(codes)))}"}
        for status, codes in names.items()
    }
