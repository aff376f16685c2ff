"""Spans of time as people write them: 90s, 15m, 24h, 90d, 2w."""

from __future__ import annotations

import re
from typing import Final

_SPAN: Final = re.compile(r"([1-9][0-9]{0,8})([smhdw])", re.ASCII)
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def parse_duration(text: str) -> float:
    """Read a span in seconds.

    Raises:
        ValueError: It is none.
    """
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ValueError("a span of time is a number and a unit, such as 90s, 15m, 24h or 90d")
    return float(int(match[1]) * _UNIT_S[match[2]])
