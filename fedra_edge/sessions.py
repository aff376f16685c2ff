"""Sessions: the bearer secrets of requests, made with the client's key whenever one is needed."""

from __future__ import annotations

import logging
import threading
from typing import Final

from fedra_edge.errors import (
    ChallengeRefusedError,
    IdentityError,
    NotAuthenticatedError,
    SignatureRefusedError,
)
from fedra_edge.identity import Identity
from fedra_edge.keys import ClientKey, KeyFiles
from fedra_edge.protocol import routes
from fedra_edge.protocol.trust import Challenge, SessionReceipt, SessionRequest, session_message
from fedra_edge.transport import Request, Transport, json_request

LOGGER: Final = logging.getLogger(__name__)
_MOST_CHALLENGES: Final = 3
"""One that the server made before it was restarted is refused."""


class GivenSession:
    """A session that somebody else has made; when it has ended, nothing can be done here."""

    def __init__(self, session: str) -> None:
        self._session = session

    def get(self) -> str:
        """Give it."""
        return self._session

    def renew(self, stale: str) -> None:
        """There is no other one."""


class KeySessions:
    """Sessions of a member, one at a time for all threads; keys are read when one is made."""

    def __init__(
        self, transport: Transport, keys: KeyFiles, identity: Identity, session: str | None = None
    ) -> None:
        self._transport = transport
        self._keys = keys
        self._identity = identity
        self._session = session
        self._lock = threading.Lock()

    @property
    def latest(self) -> str | None:
        """The session that was used last, if any was needed; it may have ended."""
        return self._session

    def get(self) -> str:
        """Give the session, made now if there was none.

        Raises:
            ServerUnreachableError: No answer.
            ServerRefusedError: The server does not take this client, or its key, any more.
            IdentityError: No key can be read.
        """
        with self._lock:
            if self._session is None:
                self._session = self._make()
            return self._session

    def renew(self, stale: str) -> str:
        """Give another session than this one; who comes first makes it for all."""
        with self._lock:
            if self._session is None or self._session == stale:
                self._session = None
                self._session = self._make()
                LOGGER.debug("a new session was made")
            return self._session

    def _make(self) -> str:
        """Prove ourselves by the key to come if there is one, else by the current one."""
        refusal: SignatureRefusedError | None = None
        for key in self._keys.candidates():
            try:
                session = self._sign_in(key)
            except SignatureRefusedError as error:
                refusal = error
            except NotAuthenticatedError as error:
                error.remedy = self._how_to_come_back
                raise
            else:
                self._keys.promote(key)
                return session
        if refusal is not None:
            refusal.remedy = self._how_to_come_back
            raise refusal
        raise IdentityError("this client's key is gone", remedy=self._how_to_come_back)

    def _sign_in(self, key: ClientKey) -> str:
        for _ in range(_MOST_CHALLENGES - 1):
            try:
                return self._answer_challenge(key)
            except ChallengeRefusedError:
                LOGGER.debug("the challenge was refused; taking another one")
        return self._answer_challenge(key)

    def _answer_challenge(self, key: ClientKey) -> str:
        asked = Request(routes.CHALLENGE, routes.CHALLENGE.path, is_anonymous=True)
        challenge = self._transport.ask(asked, Challenge).challenge
        client_id = self._identity.client_id
        message = session_message(self._identity.ca_sha256, client_id, challenge)
        signed = SessionRequest(
            client_id=client_id, challenge=challenge, signature=key.sign(message)
        )
        request = json_request(routes.SESSION, routes.SESSION.path, signed, is_anonymous=True)
        return self._transport.ask(request, SessionReceipt).session

    @property
    def _how_to_come_back(self) -> str:
        return (
            "this home may be a copy, or this client was enrolled again elsewhere; ask "
            "headquarters for a join string made by `fedra-server token create --client "
            f"{self._identity.client_id}`, run `fedra-edge leave --forget`, and join with it"
        )
