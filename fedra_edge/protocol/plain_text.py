"""Text of others without what a terminal would obey: for messages, and for lines of a log."""

from __future__ import annotations

import logging
import re
from typing import Final

from typing_extensions import override

_OBEYED: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
"""Control characters but tabs and line feeds, and what changes the direction of writing."""
_LOG_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def plain(text: str) -> str:
    """Put a mark in the place of every control character; tabs and line breaks stay."""
    return _OBEYED.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\0", ""))


def plain_line(text: str) -> str:
    """Write control characters as escapes, so that one line stays one line."""
    return _OBEYED.sub(_escape, text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


class PlainFormatter(logging.Formatter):
    """Writes each record as one line, and a traceback as indented ones: nobody forges a line."""

    @override
    def formatMessage(self, record: logging.LogRecord) -> str:
        """Write the line."""
        return plain_line(super().formatMessage(record))

    @override
    def formatException(self, ei: object) -> str:
        """Write the traceback."""
        lines = super().formatException(ei).split("\n")  # type: ignore[arg-type]
        return "\n".join(f"  {plain_line(line)}" for line in lines)


def log_plainly(level: int | str) -> None:
    """Log to standard error, unless logging was set up before."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter(_LOG_FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
