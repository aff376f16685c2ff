"""Who the server is, and how a client proves who it is: authority, challenges, sessions."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.problems import Problem, ProblemCode
from fedra_edge.protocol.trust import (
    Authority,
    Challenge,
    SessionReceipt,
    SessionRequest,
    session_message,
)
from fedra_server.errors import NotAuthenticatedError
from fedra_server.http import challenges, sessions
from fedra_server.http.auth import SpeaksProtocol, check_protocol_if_told
from fedra_server.http.mounting import mount
from fedra_server.http.services import ServicesHere
from fedra_server.signatures import check_signature
from fedra_server.storage.tokens import require_member

router = APIRouter(tags=["trust"])
_UNKNOWN_REMEDY = "Ask the operator for a new join string ('fedra-server token create')."


@mount(
    router,
    routes.AUTHORITY,
    ProblemCode.PROTOCOL_MISMATCH,
    dependencies=[Depends(check_protocol_if_told)],
)
async def tell_authority(services: ServicesHere) -> Authority:
    """Tell the certificate authority to anyone; a fingerprint from elsewhere makes it trusted."""
    return services.authority


@mount(
    router,
    routes.CHALLENGE,
    ProblemCode.PROTOCOL_MISMATCH,
    status_code=201,
    dependencies=[SpeaksProtocol],
)
async def draw_challenge(services: ServicesHere) -> Challenge:
    """Give something to sign; nothing is kept of it."""
    challenge = services.challenges.draw(services.clock.now())
    return Challenge(challenge=challenge, expires_in_s=challenges.LIFETIME_S)


@mount(
    router,
    routes.SESSION,
    ProblemCode.PROTOCOL_MISMATCH,
    ProblemCode.NOT_AUTHENTICATED,
    ProblemCode.CHALLENGE_INVALID,
    ProblemCode.SIGNATURE_INVALID,
    ProblemCode.CLIENT_REVOKED,
    status_code=201,
    responses={503: {"model": Problem, "description": "Too many machines sign in at once."}},
    dependencies=[SpeaksProtocol],
)
def open_session(request: SessionRequest, services: ServicesHere) -> SessionReceipt:
    """Begin a session for who holds a client's key; its secret is told this once."""
    now = services.clock.now()
    services.challenges.check(request.challenge, now)
    found = services.store.client_and_key(ClientId(request.client_id))
    if found is None:
        raise NotAuthenticatedError("the server does not know this client", remedy=_UNKNOWN_REMEDY)
    client, public_key = found
    message = session_message(services.authority.ca_sha256, client.client_id, request.challenge)
    check_signature(public_key, request.signature, message)
    services.challenges.take(request.challenge, now)
    require_member(client)
    session = services.sessions.open(client.client_id, now)
    return SessionReceipt(session=session, expires_in_s=sessions.LIFETIME_S)
