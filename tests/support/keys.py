"""What a client does to be believed: its key, enrolments, challenges and sessions, over HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from nacl.signing import SigningKey
from pydantic import BaseModel

from fedra_edge.protocol import routes
from fedra_edge.protocol.messages import EnrolReceipt, EnrolRequest
from fedra_edge.protocol.routes import Route
from fedra_edge.protocol.trust import (
    Authority,
    Challenge,
    KeyChange,
    SessionReceipt,
    SessionRequest,
    enrolment_message,
    key_message,
    session_message,
    to_base64url,
)
from tests.support.builders import make_profile


@dataclass(frozen=True)
class SiteKey:
    """An Ed25519 key pair, as a site keeps it."""

    private: SigningKey = field(default_factory=SigningKey.generate)

    @classmethod
    def from_pem(cls, pem: bytes) -> SiteKey:
        """Read the key of a site, by another library than the site has written it with."""
        private = load_pem_private_key(pem, password=None)
        assert isinstance(private, Ed25519PrivateKey)
        return cls(SigningKey(private.private_bytes_raw()))

    @property
    def public(self) -> str:
        return to_base64url(bytes(self.private.verify_key))

    def sign(self, message: bytes) -> str:
        return to_base64url(self.private.sign(message).signature)

    def enrolment(
        self,
        ca_sha256: str,
        name: str | None = None,
        run: str | None = None,
        join_secret: str | None = None,
    ) -> EnrolRequest:
        """Make a request that must be believed; the machine is a big one, of some name."""
        return EnrolRequest(
            name=name or f"plant {self.public}",
            profile=make_profile(memory_bytes=2**40, baseline_bytes=10**8),
            run=run,
            public_key=self.public,
            join_secret=join_secret,
            signature=self.sign(enrolment_message(ca_sha256, self.public, join_secret)),
        )

    def session_request(self, ca_sha256: str, client_id: str, challenge: str) -> SessionRequest:
        """Answer a challenge."""
        signature = self.sign(session_message(ca_sha256, client_id, challenge))
        return SessionRequest(client_id=client_id, challenge=challenge, signature=signature)

    def change_for(self, ca_sha256: str, client_id: str, previous: SiteKey) -> KeyChange:
        """Ask to be the key of a client from now on, as the one before it agrees."""
        message = key_message(ca_sha256, client_id, self.public)
        return KeyChange(
            public_key=self.public,
            signature=self.sign(message),
            previous_signature=previous.sign(message),
        )


def ask(
    http: httpx.Client, route: Route, body: BaseModel, session: str | None = None
) -> httpx.Response:
    """Send a value, as it is on the wire, perhaps as somebody."""
    headers = {"Content-Type": "application/json"}
    if session is not None:
        headers["Authorization"] = f"Bearer {session}"
    return http.request(route.method, route.path, content=body.model_dump_json(), headers=headers)


def authority_of(http: httpx.Client) -> Authority:
    """Ask a server who it is."""
    answer = http.get(routes.AUTHORITY.path)
    assert answer.status_code == 200, answer.text
    return Authority.model_validate_json(answer.content)


def draw_challenge(http: httpx.Client) -> str:
    """Ask for something to sign."""
    answer = http.post(routes.CHALLENGE.path)
    assert answer.status_code == 201, answer.text
    return Challenge.model_validate_json(answer.content).challenge


def enrol_key(
    http: httpx.Client,
    key: SiteKey,
    name: str | None = None,
    run: str | None = None,
    join_secret: str | None = None,
) -> str:
    """Become a client; give its id."""
    request = key.enrolment(authority_of(http).ca_sha256, name, run, join_secret)
    answer = ask(http, routes.ENROL, request)
    assert answer.status_code == 201, answer.text
    return EnrolReceipt.model_validate_json(answer.content).client_id


def open_session(http: httpx.Client, key: SiteKey, client_id: str) -> str:
    """Sign in; give the session's secret."""
    ca_sha256 = authority_of(http).ca_sha256
    request = key.session_request(ca_sha256, client_id, draw_challenge(http))
    answer = ask(http, routes.SESSION, request)
    assert answer.status_code == 201, answer.text
    return SessionReceipt.model_validate_json(answer.content).session
