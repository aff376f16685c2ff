"""A CSV file that holds texts with their labels."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedra_edge.data.csv_rows import CsvRow, read_rows
from fedra_edge.data.dataset import SkipReport, TextExample
from fedra_edge.data.texts import problem_of_text


class TextManifest:
    """Rows of ``text,label`` and optionally ``split`` (train or test), in UTF-8.

    The separator may be a comma, semicolon or tab. Texts that cannot be used are noted in
    ``skipped`` by their line.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.skipped = SkipReport()
        self._rows: list[CsvRow] = []
        for row in read_rows(self.path, "text"):
            problem = problem_of_text(row.content)
            if problem is None:
                self._rows.append(row)
            else:
                self.skipped.add(problem, f"line {row.line}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TextExample:
        return TextExample(self._rows[index].content, self._rows[index].label)

    def label_of(self, index: int) -> str:
        """Give the label column."""
        return self._rows[index].label

    def key_of(self, index: int) -> str:
        """Give a digest of the text, so that equal texts are held out together."""
        digest = hashlib.sha256(self._rows[index].content.encode()).hexdigest()
        return f"text {digest[:16]}"

    def is_held_out(self, index: int) -> bool | None:
        """Tell whether the split column says test; None when it is empty or missing."""
        return self._rows[index].held_out
