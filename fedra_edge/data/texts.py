"""Reads text files safely and says what is wrong with a text."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedra_edge.errors import DataError

MAX_TEXT_BYTES: Final = 2**20
"""Larger texts are refused before they are read: no model here looks at that much."""

TEXT_SUFFIXES: Final = frozenset({".txt"})


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        DataError: The file is missing, empty, too large, or no text.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise DataError("not a regular file" if path.exists() else "file not found")
        with path.open("rb") as file:
            raw = file.read(MAX_TEXT_BYTES + 1)
        text = raw.decode("utf-8-sig") if len(raw) <= MAX_TEXT_BYTES else ""
    except UnicodeDecodeError as error:
        raise DataError("text is not UTF-8") from error
    except OSError as error:
        raise DataError("unreadable text") from error
    problem = "text is too large" if len(raw) > MAX_TEXT_BYTES else problem_of_text(text)
    if problem is not None:
        raise DataError(problem)
    return text


def problem_of_text(text: str) -> str | None:
    """Say why a text cannot be used; None when it can."""
    if not text.strip():
        return "text is empty"
    return "text has NUL characters" if "\0" in text else None
