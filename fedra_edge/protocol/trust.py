"""Trust between both sides: join strings, what is signed and how, and the bodies that carry it.

A server is named by the sha256 of its authority's certificate, a client by its Ed25519 key.
Signing itself is left to either side, so that this contract needs no cryptographic library.
"""

from __future__ import annotations

import hashlib
import re
import ssl
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from typing import Annotated, Final, Literal

from pydantic import Field
from typing_extensions import override

from fedra_edge.protocol.wire import HexDigest, Seconds, Token, WireModel

Purpose = Literal["enrol", "session", "key"]

# The last character has no spare bits set, so that no key and no signature has two spellings.
PublicKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]$")]
"""The 32 bytes of an Ed25519 key, in base64url without padding."""
Signature = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{85}[AQgw]$")]
"""The 64 bytes of an Ed25519 signature, in base64url without padding."""
JoinSecret = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
"""What a join token admits with: its id, a hyphen, and what nobody can guess."""
Bearer = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
"""The secret of a session, as it stands in ``Authorization: Bearer``."""

MAX_CA_PEM_CHARS: Final = 8192
_SIGNED: Final = ("fedra", "2")
_JOIN_STRING: Final = re.compile(
    r"(?P<address>https?://[^\s/#?@\\][^\s#?@\\]{0,1023})"
    r"#(?P<secret>[A-Za-z0-9_-]{1,128})\.(?P<ca_sha256>[0-9a-f]{64})",
    re.ASCII,
)
_CERTIFICATE: Final = re.compile(
    r"\s*+-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/\s]++={0,2}\s*+-----END CERTIFICATE-----\s*+",
    re.ASCII,
)


class Authority(WireModel):
    """The server's certificate authority, told to anyone; only its digest makes it trusted."""

    ca_pem: Annotated[str, Field(max_length=MAX_CA_PEM_CHARS)]
    ca_sha256: HexDigest


class Challenge(WireModel):
    """Something to sign, once and soon."""

    challenge: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]
    expires_in_s: Seconds


class SessionRequest(WireModel):
    """Proves to hold a client's key; signs ``("session", ca_sha256, client_id, challenge)``."""

    client_id: Token
    challenge: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]
    signature: Signature


class SessionReceipt(WireModel):
    """A session; its secret is told this once, and the server forgets it when it ends."""

    session: Annotated[Bearer, Field(repr=False)]
    expires_in_s: Seconds


class KeyChange(WireModel):
    """A client's next key; it and the key in force sign what `key_message` gives.

    So neither a session nor a new key alone can take a membership over.
    """

    public_key: PublicKey
    signature: Signature
    previous_signature: Signature


@dataclass(frozen=True)
class JoinString:
    """All that a site types: where the server is, what admits there, and who it must prove to be.

    Written ``ADDRESS#SECRET.CA_SHA256``; the address has no slash at its end.
    """

    address: str
    secret: str = field(repr=False)
    ca_sha256: str

    @classmethod
    def parse(cls, text: str) -> JoinString:
        """Read a join string; spaces around it do not matter.

        Raises:
            ValueError: It is none, or a part of it is missing; the message holds no secret.
        """
        match = _JOIN_STRING.fullmatch(text.strip())
        if match is None:
            raise ValueError("this is no complete join string; it reads ADDRESS#SECRET.FINGERPRINT")
        address, secret, ca_sha256 = match.groups()
        return cls(address.rstrip("/"), secret, ca_sha256)

    @override
    def __str__(self) -> str:
        """Write it as `parse` reads it."""
        return f"{self.address}#{self.secret}.{self.ca_sha256}"


def is_join_string(text: str) -> bool:
    """Tell whether a text is meant as a join string rather than as a plain address."""
    return "#" in text


def signed_message(purpose: Purpose, audience: str, *parts: str) -> bytes:
    """Give the bytes that are signed; no part can be taken for two.

    Raises:
        ValueError: A part holds a line break.
    """
    lines = (*_SIGNED, purpose, audience, *parts)
    if any("\n" in line for line in lines):
        raise ValueError("what is signed holds no line breaks")
    return "\n".join(lines).encode()


def enrolment_message(ca_sha256: str, public_key: str, join_secret: str | None) -> bytes:
    """Give what an enrolment signs; the secret is part of it by digest only."""
    secret_sha256 = hashlib.sha256((join_secret or "").encode()).hexdigest()
    return signed_message("enrol", ca_sha256, public_key, secret_sha256)


def session_message(ca_sha256: str, client_id: str, challenge: str) -> bytes:
    """Give what a request for a session signs."""
    return signed_message("session", ca_sha256, client_id, challenge)


def key_message(ca_sha256: str, client_id: str, public_key: str) -> bytes:
    """Give what a new key and the one before it sign when they change places."""
    return signed_message("key", ca_sha256, client_id, public_key)


def to_base64url(data: bytes) -> str:
    """Write bytes as keys and signatures are written."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def from_base64url(text: str) -> bytes:
    """Read what `to_base64url` wrote.

    Raises:
        ValueError: It did not.
    """
    data = urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4))
    if to_base64url(data) != text:
        raise ValueError("this is no base64url without padding")
    return data


def certificate_sha256(pem: str) -> str:
    """Digest the one certificate of a PEM text, as fingerprints are made.

    Raises:
        ValueError: There is none, more than one, or something else beside it.
    """
    return hashlib.sha256(_certificate_der(pem)).hexdigest()


def pinned_pem(authority: Authority, ca_sha256: str) -> str:
    """Give the certificate that a fingerprint names, and nothing that came along with it.

    Raises:
        ValueError: The authority is another one.
    """
    der = _certificate_der(authority.ca_pem)
    if hashlib.sha256(der).hexdigest() != ca_sha256 or authority.ca_sha256 != ca_sha256:
        raise ValueError("this certificate authority is not the one that the join string names")
    return ssl.DER_cert_to_PEM_cert(der)


def _certificate_der(pem: str) -> bytes:
    if _CERTIFICATE.fullmatch(pem) is None:
        raise ValueError("this is not exactly one certificate in PEM form")
    return ssl.PEM_cert_to_DER_cert(pem.strip())
