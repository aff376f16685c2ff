"""A CSV file that lists images with their labels."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from pathlib import Path

from fedra_edge.data.csv_rows import CsvRow, broken, read_rows
from fedra_edge.data.dataset import Example, SkipReport
from fedra_edge.data.images import problem_of_image, read_image


class ManifestDataset:
    """Rows of ``path,label`` and optionally ``split`` (train or test), in UTF-8.

    Paths are relative to the CSV file. The separator may be a comma, semicolon or tab. A file
    listed twice, under whatever path, counts once and is noted in ``skipped``. Where labels are
    not needed, that column may be missing or empty.
    """

    def __init__(self, path: Path | str, *, needs_labels: bool = True) -> None:
        self.path = Path(path)
        self.skipped = SkipReport()
        self._rows = self._without_repeats(needs_labels=needs_labels)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return Example(read_image(self._image_path(index)), self._rows[index].label)

    def label_of(self, index: int) -> str:
        """Give the label column."""
        return self._rows[index].label

    def key_of(self, index: int) -> str:
        """Give the path column, normalised."""
        return posixpath.normpath(self._rows[index].content)

    def is_held_out(self, index: int) -> bool | None:
        """Tell whether the split column says test; None when it is empty or missing."""
        return self._rows[index].held_out

    def problem_of(self, index: int) -> str | None:
        """Try to decode the image and say why it cannot be used."""
        return problem_of_image(self._image_path(index))

    def _image_path(self, index: int) -> Path:
        return self.path.parent / self._rows[index].content

    def _without_repeats(self, *, needs_labels: bool) -> list[CsvRow]:
        rows: dict[str, CsvRow] = {}
        for row in self._read(needs_labels=needs_labels):
            file = os.path.normcase(os.path.realpath(self.path.parent / row.content))
            known = rows.setdefault(file, row)
            if known is row:
                continue
            is_same = (known.label, known.held_out) == (row.label, row.held_out)
            again = "listed twice" if is_same else "listed twice with different values"
            self.skipped.add(again, f"{row.content} in line {row.line}")
        return list(rows.values())

    def _read(self, *, needs_labels: bool) -> Iterator[CsvRow]:
        for row in read_rows(self.path, "path", needs_labels=needs_labels):
            if not row.content:
                raise broken(self.path, row.line, "has no path")
            if "\0" in row.content:
                raise broken(self.path, row.line, "has a path with a NUL character")
            yield row._replace(content=row.content.replace("\\", "/"))
