"""A CSV file that lists images with their labels."""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from fedra_edge.data.dataset import Example, SkipReport
from fedra_edge.data.images import problem_of_image, read_image
from fedra_edge.errors import DataError

_HELD_OUT_BY_SPLIT: Final = {"": None, "train": False, "test": True}
_REMEDY: Final = "The first line names the columns: path,label or path,label,split."


class _Row(NamedTuple):
    path: str
    label: str
    held_out: bool | None

    @property
    def key(self) -> str:
        """The path, freed of what makes two spellings of it differ."""
        return posixpath.normpath(self.path)


class ManifestDataset:
    """Rows of ``path,label`` and optionally ``split`` (train or test), in UTF-8.

    Paths are relative to the CSV file. The separator may be a comma, semicolon or tab. A file
    listed twice, under whatever path, counts once and is noted in ``skipped``.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.skipped = SkipReport()
        self._rows = self._read()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return Example(read_image(self._image_path(index)), self._rows[index].label)

    def label_of(self, index: int) -> str:
        """Give the label column."""
        return self._rows[index].label

    def key_of(self, index: int) -> str:
        """Give the path column, normalised."""
        return self._rows[index].key

    def is_held_out(self, index: int) -> bool | None:
        """Tell whether the split column says test; None when it is empty or missing."""
        return self._rows[index].held_out

    def problem_of(self, index: int) -> str | None:
        """Try to decode the image and say why it cannot be used."""
        return problem_of_image(self._image_path(index))

    def _image_path(self, index: int) -> Path:
        return self.path.parent / self._rows[index].path

    def _read(self) -> list[_Row]:
        text = _read_text(self.path)
        rows: dict[str, _Row] = {}
        for line, row in _parse(text, self.path):
            file = os.path.normcase(os.path.realpath(self.path.parent / row.path))
            known = rows.setdefault(file, row)
            if known is row:
                continue
            is_same = (known.label, known.held_out) == (row.label, row.held_out)
            again = "listed twice" if is_same else "listed twice with different values"
            self.skipped.add(again, f"{row.path} in line {line}")
        return list(rows.values())


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", remedy=_REMEDY) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _broken(path, line, "is not UTF-8", "Save the file as CSV UTF-8.") from error


def _parse(text: str, path: Path) -> Iterator[tuple[int, _Row]]:
    header_line = text.partition("\n")[0]
    separator = next((mark for mark in ",;\t" if mark in header_line), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        _check_columns(columns, path)
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, _parse_row(columns, cells, path, reader.line_num)
    except csv.Error as error:
        raise _broken(path, reader.line_num, f"is not CSV: {error}") from error


def _check_columns(columns: Sequence[str], path: Path) -> None:
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise _broken(path, 1, f"lacks the column {' and '.join(missing)}")
    if len(set(columns)) != len(columns):
        raise _broken(path, 1, "repeats a column name")


def _parse_row(columns: Sequence[str], cells: Sequence[str], path: Path, line: int) -> _Row:
    if len(cells) != len(columns):
        raise _broken(path, line, f"has {len(cells)} values for {len(columns)} columns")
    values = dict(zip(columns, (cell.strip() for cell in cells), strict=True))
    split = values.get("split", "").lower()
    if split not in _HELD_OUT_BY_SPLIT:
        raise _broken(path, line, f"has split {split[:40]!r}", "Use train, test or nothing.")
    for name in ("path", "label"):
        if not values[name]:
            raise _broken(path, line, f"has no {name}")
    image_path = values["path"].replace("\\", "/")
    if "\0" in image_path:
        raise _broken(path, line, "has a path with a NUL character")
    return _Row(image_path, values["label"], _HELD_OUT_BY_SPLIT[split])


def _broken(path: Path, line: int, problem: str, remedy: str = _REMEDY) -> DataError:
    return DataError(f"{path}, line {line}: the line {problem}", remedy=remedy)
