"""Who operates the server over HTTP: the credential of an operator, and what its role allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from fedra_edge.protocol.problems import ProblemCode
from fedra_server.errors import NotAuthenticatedError, RefusedError
from fedra_server.http.fairness import CALLER
from fedra_server.http.services import ServicesHere
from fedra_server.roles import OperatorRecord, Role

_BEARER: Final = HTTPBearer(
    scheme_name="operator",
    auto_error=False,
    description="The secret that `fedra-server operator add` told once.",
)
_REMEDY: Final = "Add an operator with 'fedra-server operator add NAME --role ROLE'."
FOR_OPERATORS: Final = (ProblemCode.NOT_AUTHENTICATED, ProblemCode.ROLE_INSUFFICIENT)
"""What any route for operators may refuse."""


def with_role(needed: Role) -> Callable[..., OperatorRecord]:
    """Make a dependency that lets operators of a role, or of a higher one, pass."""

    def require(
        request: Request,
        services: ServicesHere,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
    ) -> OperatorRecord:
        if bearer is None:
            raise NotAuthenticatedError(
                "the request has no 'Authorization: Bearer ...' header of an operator",
                remedy=_REMEDY,
            )
        now = services.clock.now()
        operator = services.store.operator_by_secret(bearer.credentials, now)
        if operator is None:
            raise NotAuthenticatedError("no operator has this credential", remedy=_REMEDY)
        setattr(request.state, CALLER, author(operator))
        if not operator.may(needed):
            raise RefusedError(
                ProblemCode.ROLE_INSUFFICIENT,
                f"this needs the role {needed}; operator {operator.name} has {operator.role}",
            )
        return operator

    return require


def author(operator: OperatorRecord) -> str:
    """Name an operator as the journal does."""
    return f"operator {operator.name}"


Scraper = Annotated[OperatorRecord, Depends(with_role(Role.SCRAPE))]
Viewer = Annotated[OperatorRecord, Depends(with_role(Role.VIEW))]
Steerer = Annotated[OperatorRecord, Depends(with_role(Role.OPERATE))]
Administrator = Annotated[OperatorRecord, Depends(with_role(Role.ADMINISTER))]
"""A handler parameter of such a type requires that role and receives the operator."""
