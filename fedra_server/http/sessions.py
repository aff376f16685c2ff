"""Open sessions, in memory only: which client a bearer secret stands for, and until when."""

from __future__ import annotations

import secrets
import threading
from collections import defaultdict, deque
from typing import Final, NamedTuple

from fedra_edge.protocol.ids import ClientId
from fedra_server.storage.tokens import secret_sha256

LIFETIME_S: Final = 86_400.0
_MOST_OF_A_CLIENT: Final = 4


class _Session(NamedTuple):
    client_id: ClientId
    expires_at: float


class Sessions:
    """Knows each session by the digest of its secret; a client has the few that it opened last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sessions: dict[str, _Session] = {}
        self._of_client: defaultdict[ClientId, deque[str]] = defaultdict(deque)

    def open(self, client_id: ClientId, now: float) -> str:
        """Begin a session; give its secret."""
        secret = secrets.token_urlsafe(32)
        digest = secret_sha256(secret)
        with self._lock:
            self._forget_expired(now)
            self._sessions[digest] = _Session(client_id, now + LIFETIME_S)
            own = self._of_client[client_id]
            own.append(digest)
            if len(own) > _MOST_OF_A_CLIENT:
                self._sessions.pop(own.popleft(), None)
        return secret

    def client_of(self, secret: str, now: float) -> ClientId | None:
        """Tell who opened a session; None when there is no such session any more."""
        found = self._sessions.get(secret_sha256(secret))
        return None if found is None or found.expires_at <= now else found.client_id

    def end_all(self, client_id: ClientId) -> None:
        """End every session of a client."""
        with self._lock:
            for digest in self._of_client.pop(client_id, ()):
                self._sessions.pop(digest, None)

    def __len__(self) -> int:
        """Count the sessions that are kept."""
        return len(self._sessions)

    def _forget_expired(self, now: float) -> None:
        """Forget the sessions that are over; they end in the order in which they began."""
        while self._sessions:
            digest, session = next(iter(self._sessions.items()))
            if session.expires_at > now:
                return
            del self._sessions[digest]
            own = self._of_client[session.client_id]
            own.remove(digest)
            if not own:
                del self._of_client[session.client_id]
