"""A scripted server that lets members in by their key, and can forget, refuse and revoke them."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from fedra_edge.config import EdgeConfig
from fedra_edge.identity import Identity
from fedra_edge.membership import Membership
from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.messages import EnrolReceipt, EnrolRequest
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.trust import (
    Authority,
    Challenge,
    KeyChange,
    SessionReceipt,
    SessionRequest,
    enrolment_message,
    from_base64url,
    key_message,
    session_message,
)
from tests.support.wire_server import Received, Reply, Script

CLIENT_ID = "c1"
_AUDIENCE = "ab" * 32


def is_signed(public_key: str, signature: str, message: bytes) -> bool:
    """Check a signature as the server does."""
    try:
        VerifyKey(from_base64url(public_key)).verify(message, from_base64url(signature))
    except BadSignatureError:
        return False
    return True


def make_member(config: EdgeConfig, client_id: str = CLIENT_ID, ca_sha256: str = _AUDIENCE) -> str:
    """Let a home be that of a member, with a key of its own; give the key's public half."""
    membership = Membership.of(config)
    key = membership.keys.current()
    membership.identity_file.save(Identity(ClientId(client_id), ca_sha256))
    return key.public_key


@dataclass
class Gate:
    """Answers what is about trust; the rest goes to ``behind`` if it comes with a session.

    ``public_key`` is that of the one member there may be; ``refusals`` are codes that sessions
    are refused with before any is made, and ``answers`` what enrolments and changes of a key get
    in place of a good answer, after they have happened.
    """

    authority: Authority = field(default_factory=lambda: Authority(ca_pem="", ca_sha256=_AUDIENCE))
    behind: Script = field(default=lambda _received: Reply(204))
    public_key: str = ""
    admits: str | None = None
    is_revoked: bool = False
    refusals: list[ProblemCode] = field(default_factory=list)
    answers: list[Reply] = field(default_factory=list)
    sessions_made: int = 0
    _valid: set[str] = field(default_factory=set)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def forget_sessions(self) -> None:
        """Be restarted."""
        self._valid.clear()

    def __call__(self, received: Received) -> Reply:
        """Answer a request."""
        answers: dict[tuple[str, str], Callable[[Received], Reply]] = {
            (routes.AUTHORITY.method, routes.AUTHORITY.path): lambda _: Reply.of(self.authority),
            (routes.ENROL.method, routes.ENROL.path): self._enrol,
            (routes.CHALLENGE.method, routes.CHALLENGE.path): self._challenge,
            (routes.SESSION.method, routes.SESSION.path): self._open_session,
        }
        path = received.path.partition("?")[0]
        with self._lock:
            if answer := answers.get((received.method, path)):
                return answer(received)
            if self.is_revoked:
                return Reply.problem(ProblemCode.CLIENT_REVOKED, 403)
            bearer = received.headers.get("Authorization", "").removeprefix("Bearer ")
            if bearer not in self._valid:
                return Reply.problem(ProblemCode.NOT_AUTHENTICATED, 401)
            if (received.method, path) == (routes.CHANGE_KEY.method, routes.CHANGE_KEY.path):
                return self._change_key(received)
        return self.behind(received)

    def _enrol(self, received: Received) -> Reply:
        asked = EnrolRequest.model_validate_json(received.body)
        message = enrolment_message(
            self.authority.ca_sha256, asked.public_key, json.loads(received.body)["join_secret"]
        )
        if not is_signed(asked.public_key, asked.signature, message):
            return Reply.problem(ProblemCode.SIGNATURE_INVALID, 403)
        if self.is_revoked and asked.public_key == self.public_key:
            return Reply.problem(ProblemCode.CLIENT_REVOKED, 403)
        if asked.public_key != self.public_key and asked.join_secret != self.admits:
            return Reply.problem(ProblemCode.JOIN_TOKEN_INVALID, 403)
        self.public_key, self.is_revoked = asked.public_key, False
        return self._good(Reply.of(EnrolReceipt(client_id=CLIENT_ID), 201))

    def _challenge(self, _received: Received) -> Reply:
        challenge = f"challenge-{next(self._numbers)}"
        return Reply.of(Challenge(challenge=challenge, expires_in_s=60.0), 201)

    def _open_session(self, received: Received) -> Reply:
        asked = SessionRequest.model_validate_json(received.body)
        message = session_message(self.authority.ca_sha256, asked.client_id, asked.challenge)
        if self.refusals:
            return Reply.problem(self.refusals.pop(0), 403)
        if self.is_revoked:
            return Reply.problem(ProblemCode.CLIENT_REVOKED, 403)
        if not is_signed(self.public_key, asked.signature, message):
            return Reply.problem(ProblemCode.SIGNATURE_INVALID, 403)
        self.sessions_made += 1
        session = f"session-{self.sessions_made}"
        self._valid.add(session)
        return Reply.of(SessionReceipt(session=session, expires_in_s=86_400.0), 201)

    def _change_key(self, received: Received) -> Reply:
        asked = KeyChange.model_validate_json(received.body)
        message = key_message(self.authority.ca_sha256, CLIENT_ID, asked.public_key)
        if not is_signed(asked.public_key, asked.signature, message):
            return Reply.problem(ProblemCode.SIGNATURE_INVALID, 403)
        if asked.public_key == self.public_key:
            return self._good(Reply(204))
        if not is_signed(self.public_key, asked.previous_signature, message):
            return Reply.problem(ProblemCode.SIGNATURE_INVALID, 403)
        self.public_key = asked.public_key
        self.forget_sessions()
        return self._good(Reply(204))

    def _good(self, answer: Reply) -> Reply:
        """Answer well, unless the answer is to be lost on its way."""
        return self.answers.pop(0) if self.answers else answer
