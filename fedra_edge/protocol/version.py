"""The protocol version both sides speak, and the rule that says who may talk to whom."""

from __future__ import annotations

from typing import Final

PROTOCOL_VERSION: Final = "2.0"
"""Major.minor. A minor step only adds optional fields and routes; a major step may break."""

PROTOCOL_HEADER: Final = "Fedra-Protocol"
"""HTTP header in which each side states its protocol version."""

_LONGEST_NUMBER: Final = 9
"""What has more digits is no version, and with thousands of them not even a number to Python."""


def is_compatible(ours: str, theirs: str) -> bool:
    """Tell whether two protocol versions can work together: same major, any minor."""
    return _major(ours) == _major(theirs)


def upgrade_advice(client: str, server: str, release: str = "") -> str:
    """Say which of two sides that cannot work together must be upgraded, and to what.

    ``release`` is the version of the software on the server, where it is known.
    """
    runs = f" (the server runs fedra {release})" if release else ""
    if not _is_number(_major(client)) or not _is_number(_major(server)):
        return "Check that both sides are Fedra: one of them states no protocol version."
    if int(_major(client)) < int(_major(server)):
        return (
            f"Upgrade the client on this machine to a release that speaks protocol "
            f"{_major(server)}.x{runs}."
        )
    return (
        f"Upgrade the server to a release that speaks protocol {_major(client)}.x, or install a "
        f"client on this machine that speaks {_major(server)}.x{runs}."
    )


def skew(ours: str, theirs: str) -> str:
    """Say in a word how a compatible peer differs; empty when it does not."""
    minors = _minor(ours), _minor(theirs)
    if not is_compatible(ours, theirs) or not all(map(_is_number, minors)):
        return ""
    mine, other = map(int, minors)
    return "older" if other < mine else "newer" if other > mine else ""


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= _LONGEST_NUMBER


def _major(version: str) -> str:
    return version.partition(".")[0]


def _minor(version: str) -> str:
    return version.partition(".")[2]
