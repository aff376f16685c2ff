"""Reads CSV files of labelled examples: one column for the content, label and perhaps split."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from fedra_edge.errors import DataError

MAX_CSV_BYTES: Final = 64 * 2**20
"""Larger files are refused before they are read: all rows are held in memory."""

_REMEDY: Final = (
    "The first line names the columns: path,label for images, text,label for texts, "
    "and split after them if need be."
)
_HELD_OUT_BY_SPLIT: Final = {"": None, "train": False, "test": True}


class CsvRow(NamedTuple):
    """A row, the number of its last line in the file, and what its split column says."""

    line: int
    content: str
    label: str
    held_out: bool | None


def read_columns(path: Path) -> list[str]:
    """Read the names of the columns, in lower case; none when there are no such names."""
    try:
        with path.open("rb") as file:
            header = file.readline(2**16).decode("utf-8-sig")
        return _normalised(next(csv.reader([header], delimiter=_separator(header)), []))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def read_rows(path: Path, content: str, *, needs_labels: bool = True) -> Iterator[CsvRow]:
    """Yield the rows of a CSV file in UTF-8; the separator may be a comma, semicolon or tab.

    Args:
        path: The file.
        content: The column that holds the examples; it may be empty in a row.
        needs_labels: Whether every row must have a label.

    Raises:
        DataError: The file cannot be read, is too large or breaks the form.
    """
    raw = _read_bytes(path)
    header = raw.partition(b"\n")[0].decode("utf-8", "replace")
    lines = io.TextIOWrapper(io.BytesIO(raw), "utf-8-sig", newline="")
    reader = csv.reader(lines, delimiter=_separator(header), strict=True)
    try:
        columns = _normalised(next(reader, []))
        _check_columns(columns, path, content, needs_labels=needs_labels)
        for cells in reader:
            if any(cell.strip() for cell in cells):
                row = _parse_row(columns, cells, content, path, reader.line_num)
                if needs_labels and not row.label:
                    raise broken(path, reader.line_num, "has no label")
                yield row
    except csv.Error as error:
        raise broken(path, reader.line_num, f"is not CSV: {error}") from error
    except UnicodeDecodeError as error:
        line = _line_of_bad_byte(raw)
        raise broken(path, line, "is not UTF-8", "Save the file as CSV UTF-8.") from error


def broken(path: Path, line: int, problem: str, remedy: str = _REMEDY) -> DataError:
    """Say which line of a file is wrong and what the file should look like."""
    return DataError(f"{path}, line {line}: the line {problem}", remedy=remedy)


def _read_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CSV_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}",
            remedy="Let the user that runs the client read this file.",
        ) from error
    if len(raw) > MAX_CSV_BYTES:
        raise DataError(
            f"{path} is larger than {MAX_CSV_BYTES // 2**20} MiB",
            remedy="Give a directory with one directory of files per class instead.",
        )
    return raw


def _line_of_bad_byte(raw: bytes) -> int:
    try:
        raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return error.object[: error.start].count(b"\n") + 1
    return 1


def _separator(header: str) -> str:
    return next((mark for mark in ",;\t" if mark in header), ",")


def _normalised(names: Sequence[str]) -> list[str]:
    return [name.strip().lower() for name in names]


def _check_columns(columns: Sequence[str], path: Path, content: str, *, needs_labels: bool) -> None:
    needed = (content, "label") if needs_labels else (content,)
    missing = [name for name in needed if name not in columns]
    if missing:
        raise broken(path, 1, f"lacks the column {' and '.join(missing)}")
    if len(set(columns)) != len(columns):
        raise broken(path, 1, "repeats a column name")


def _parse_row(
    columns: Sequence[str], cells: Sequence[str], content: str, path: Path, line: int
) -> CsvRow:
    if len(cells) != len(columns):
        problem = f"has {len(cells)} values for {len(columns)} columns"
        raise broken(path, line, problem)
    values = dict(zip(columns, (cell.strip() for cell in cells), strict=True))
    split = values.get("split", "").lower()
    if split not in _HELD_OUT_BY_SPLIT:
        raise broken(path, line, f"has split {split[:40]!r}", "Use train, test or nothing.")
    return CsvRow(line, values[content], values.get("label", ""), _HELD_OUT_BY_SPLIT[split])
