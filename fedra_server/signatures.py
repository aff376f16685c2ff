"""Checking what a client's key has signed."""

from __future__ import annotations

from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.trust import from_base64url
from fedra_server.errors import RefusedError


def check_signature(public_key: str, signature: str, message: bytes) -> None:
    """Make sure that the holder of a key has signed a message.

    Raises:
        RefusedError: It was another key, or another message.
    """
    from nacl.exceptions import BadSignatureError  # loaded with the first client
    from nacl.signing import VerifyKey

    try:
        VerifyKey(from_base64url(public_key)).verify(message, from_base64url(signature))
    except (BadSignatureError, ValueError) as error:
        raise RefusedError(
            ProblemCode.SIGNATURE_INVALID, "the signature is not of this key, server and purpose"
        ) from error
