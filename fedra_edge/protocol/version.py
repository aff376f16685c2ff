"""The protocol version both sides speak, and the rule that says who may talk to whom."""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = "1.0"
"""Major.minor. A minor step only adds optional fields and routes; a major step may break."""

PROTOCOL_HEADER: Final = "Fedra-Protocol"
"""HTTP header in which each side states its protocol version."""


def is_compatible(ours: str, theirs: str) -> bool:
    """Tell whether two protocol versions can work together: same major, any minor."""
    return ours.partition(".")[0] == theirs.partition(".")[0]
