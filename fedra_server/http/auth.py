"""Who is calling: the protocol version and the session of a request."""

from __future__ import annotations

import functools
import logging
from typing import Annotated, Final

from fastapi import Depends, Header, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.version import (
    PROTOCOL_HEADER,
    PROTOCOL_VERSION,
    is_compatible,
    skew,
    upgrade_advice,
)
from fedra_server import __version__
from fedra_server.errors import NotAuthenticatedError, RefusedError
from fedra_server.http.fairness import CALLER
from fedra_server.http.services import ServicesHere
from fedra_server.storage.records import ClientRecord
from fedra_server.storage.tokens import require_member

LOGGER: Final = logging.getLogger(__name__)

_BEARER: Final = HTTPBearer(auto_error=False, description="The secret of a session.")


async def require_protocol(
    version: Annotated[
        str | None, Header(alias=PROTOCOL_HEADER, description="Protocol version of the caller.")
    ] = None,
) -> None:
    """Turn away a caller that speaks another major version of the protocol, or none."""
    if version is None or not is_compatible(PROTOCOL_VERSION, version):
        theirs = "nothing" if version is None else repr(version[:20])
        raise RefusedError(
            ProblemCode.PROTOCOL_MISMATCH,
            f"the server speaks protocol {PROTOCOL_VERSION}, the caller says {theirs}",
            remedy=upgrade_advice(version or "", PROTOCOL_VERSION, __version__),
        )
    _note_skew(version[:20])


async def check_protocol_if_told(
    version: Annotated[str | None, Header(alias=PROTOCOL_HEADER, include_in_schema=False)] = None,
) -> None:
    """Turn away a caller that says it speaks another major version; it need not say any."""
    if version is not None:
        await require_protocol(version)


@functools.lru_cache(maxsize=32)
def _note_skew(version: str) -> None:
    """Log once that clients of another minor version are there."""
    if word := skew(PROTOCOL_VERSION, version):
        LOGGER.info(
            "a client speaks protocol %s, %s than this server's %s; both work together",
            version,
            word,
            PROTOCOL_VERSION,
        )


def authenticate(
    request: Request,
    services: ServicesHere,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
) -> ClientRecord:
    """Find the client whose session this is, as the records know it at this moment.

    Raises:
        NotAuthenticatedError: There is no session, or it is over.
        RefusedError: The client's membership is over.
    """
    if bearer is None:
        raise NotAuthenticatedError("the request has no 'Authorization: Bearer ...' header")
    client_id = services.sessions.client_of(bearer.credentials, services.clock.now())
    if client_id is None:
        raise NotAuthenticatedError("the server knows no such session, or it is over")
    client = require_member(services.store.client(client_id))
    setattr(request.state, CALLER, client.client_id)
    return client


SpeaksProtocol: Final = Depends(require_protocol)
"""For a router whose routes all need a compatible caller."""

Caller = Annotated[ClientRecord, Depends(authenticate)]
"""A handler parameter of this type requires a session and receives its client."""
