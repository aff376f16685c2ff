"""The sha256 of a whole body as the header ``Repr-Digest`` of RFC 9530 writes it."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode, b64encode
from typing import Final

_SHA256: Final = re.compile(r"(?:^|,)\s*sha-256\s*=\s*:([A-Za-z0-9+/]{43}=):", re.ASCII)


def format_digest(sha256: str) -> str:
    """Write a digest given in hexadecimal digits."""
    return f"sha-256=:{b64encode(bytes.fromhex(sha256)).decode()}:"


def parse_digest(text: str) -> str | None:
    """Read the sha256 in hexadecimal digits; None when there is none among the digests."""
    match = _SHA256.search(text)
    if match is None:
        return None
    try:
        return b64decode(match[1], validate=True).hex()
    except binascii.Error:
        return None
