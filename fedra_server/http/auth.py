"""Who is calling: the protocol version and the credential of a request."""

from __future__ import annotations

import functools
import hashlib
import logging
import secrets
from typing import Annotated, Final, NamedTuple

from fastapi import Depends, Header, Security
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
from fedra_server.http.services import ServicesHere
from fedra_server.storage.records import ClientRecord

LOGGER: Final = logging.getLogger(__name__)

_BEARER: Final = HTTPBearer(
    auto_error=False, description="The credential that enrolment gave, told once."
)


class Credential(NamedTuple):
    """A new secret and the digest of it that the server keeps."""

    secret: str
    sha256: str


def new_credential() -> Credential:
    """Draw a secret that nobody can guess."""
    secret = secrets.token_urlsafe(32)
    return Credential(secret, credential_sha256(secret))


def credential_sha256(secret: str) -> str:
    """Digest a credential; the secret itself is never stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


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
    services: ServicesHere,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
) -> ClientRecord:
    """Find the client that a credential belongs to.

    Raises:
        NotAuthenticatedError: There is no credential, or it is nobody's.
    """
    if bearer is None:
        raise NotAuthenticatedError("the request has no 'Authorization: Bearer ...' header")
    client = services.store.client_by_credential(credential_sha256(bearer.credentials))
    if client is None or client.has_left:
        raise NotAuthenticatedError("the server does not know this credential")
    return client


SpeaksProtocol: Final = Depends(require_protocol)
"""For a router whose routes all need a compatible caller."""

Caller = Annotated[ClientRecord, Depends(authenticate)]
"""A handler parameter of this type requires a credential and receives its client."""
