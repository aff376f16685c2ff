"""How commands tell their results: JSON for programs, aligned text for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Final

import typer
from pydantic import BaseModel, JsonValue

_UNITS: Final = ("KB", "MB", "GB")
_STEP: Final = 1000
_MOST_SHOWN: Final = 400
_MOST_IN_A_CELL: Final = 120


def tell_json(value: JsonValue | BaseModel) -> None:
    """Print one JSON document."""
    if isinstance(value, BaseModel):
        typer.echo(value.model_dump_json(indent=2))
    else:
        typer.echo(json.dumps(value, indent=2))


def tell_table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """Print aligned columns, or a sentence when there are no rows."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if not cells:
        typer.echo(empty)
        return
    columns = zip(headers, *cells, strict=True)
    widths = [max(len(cell) for cell in column) for column in columns]
    for row in (headers, *cells):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


def printable(text: str) -> str:
    """Show what may come from a client without letting it steer the terminal."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."


def shorten(text: str) -> str:
    """Cut what would break a table; the JSON document has the whole."""
    return text if len(text) <= _MOST_IN_A_CELL else f"{text[: _MOST_IN_A_CELL - 3]}..."


def format_bytes(size_bytes: int) -> str:
    """Write a number of bytes for people, in powers of 1000."""
    if size_bytes < _STEP:
        return f"{size_bytes} B"
    amount = size_bytes / _STEP
    for unit in _UNITS:
        if amount < _STEP:
            return f"{amount:.1f} {unit}"
        amount /= _STEP
    return f"{amount:.1f} TB"


def format_time(moment: float) -> str:
    """Write a moment for people, in UTC."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def format_layers(layer_ids: Sequence[int]) -> str:
    """Write ascending layer ids shortly, as in 0-3,7."""
    spans: list[list[int]] = []
    for layer_id in layer_ids:
        if spans and layer_id == spans[-1][-1] + 1:
            spans[-1].append(layer_id)
        else:
            spans.append([layer_id])
    return ",".join(f"{it[0]}-{it[-1]}" if len(it) > 1 else f"{it[0]}" for it in spans)
