"""Finds the examples to predict: images or texts in any layout, with or without labels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from fedra_edge.data.csv_rows import read_rows
from fedra_edge.data.dataset import Example, SkipReport, TextExample
from fedra_edge.data.images import IMAGE_SUFFIXES, read_image
from fedra_edge.data.manifest import ManifestDataset
from fedra_edge.data.texts import TEXT_SUFFIXES, problem_of_text, read_text
from fedra_edge.errors import DataError
from fedra_edge.protocol.models import ImageInput, ModelInput

_NO_LABEL: Final = ""


@runtime_checkable
class Examples(Protocol):
    """Examples by index, whose labels are never asked for; every ``LocalDataset`` is one."""

    def __len__(self) -> int:
        """Count the examples."""
        ...

    def __getitem__(self, index: int) -> Example | TextExample:
        """Read one example; ``DataError`` or ``OSError`` when it cannot be read."""
        ...

    def key_of(self, index: int) -> str:
        """Give a name that this example keeps when others are added or removed."""
        ...


ExampleSource = Path | str | Sequence[Path | str] | Examples
"""A directory, a file, a CSV file, a list of files, or a dataset."""


class FileExamples:
    """Image or text files; a key is the path below ``root``, or without one as it was given."""

    def __init__(
        self, paths: Sequence[Path], root: Path | None = None, skipped: SkipReport | None = None
    ) -> None:
        self.skipped = skipped or SkipReport()
        self._paths = paths
        self._root = root

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example | TextExample:
        path = self._paths[index]
        if path.suffix.lower() in TEXT_SUFFIXES:
            return TextExample(read_text(path), _NO_LABEL)
        return Example(read_image(path), _NO_LABEL)

    def key_of(self, index: int) -> str:
        """Give the path, with forward slashes."""
        path = self._paths[index]
        return (path if self._root is None else path.relative_to(self._root)).as_posix()


class TextRows:
    """The column ``text`` of a CSV file; a key is the number of the line."""

    def __init__(self, path: Path) -> None:
        self._rows = list(read_rows(path, "text", needs_labels=False))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TextExample:
        text = self._rows[index].content
        if problem := problem_of_text(text):
            raise DataError(problem)
        return TextExample(text, _NO_LABEL)

    def key_of(self, index: int) -> str:
        """Give the number of the line in which the row ends."""
        return f"line {self._rows[index].line}"


def open_examples(data: ExampleSource, wanted: ModelInput) -> Examples:
    """Open what is to be predicted by a model; nothing is read but lists of files.

    A directory is searched to any depth; hidden files and directories are ignored.

    Raises:
        DataError: There is no such data, or no example in it.
    """
    examples = _opened(data, wanted)
    if not len(examples):
        where = f" in {data}" if isinstance(data, Path | str) else ""
        raise DataError(f"there is nothing to predict{where}", remedy=_remedy(wanted))
    return examples


def _opened(data: ExampleSource, wanted: ModelInput) -> Examples:
    if isinstance(data, Examples):
        return data
    if not isinstance(data, Path | str):
        return FileExamples([Path(path) for path in data])
    path = Path(data)
    if path.is_dir():
        skipped = SkipReport()
        return FileExamples(sorted(_files_below(path, _suffixes(wanted), skipped)), path, skipped)
    if path.is_file() and path.suffix.lower() == ".csv":
        is_image = isinstance(wanted, ImageInput)
        return ManifestDataset(path, needs_labels=False) if is_image else TextRows(path)
    if path.is_file() and path.suffix.lower() in _suffixes(wanted):
        return FileExamples([path], path.parent)
    problem = "is nothing that this model reads" if path.exists() else "does not exist"
    raise DataError(f"the data path {path} {problem}", remedy=_remedy(wanted))


def _suffixes(wanted: ModelInput) -> frozenset[str]:
    return IMAGE_SUFFIXES if isinstance(wanted, ImageInput) else TEXT_SUFFIXES


def _remedy(wanted: ModelInput) -> str:
    column = "path" if isinstance(wanted, ImageInput) else "text"
    files = ", ".join(sorted(_suffixes(wanted)))
    return f"Give a directory of files ({files}), one such file, or a CSV with the column {column}."


def _files_below(root: Path, suffixes: frozenset[str], skipped: SkipReport) -> Iterator[Path]:
    """Yield what lies in a directory and those below it; links are followed, once."""

    def complain(error: OSError) -> None:
        skipped.add("directory that cannot be listed", str(error.filename))

    seen = {os.path.realpath(root)}
    for place, directories, files in os.walk(root, onerror=complain, followlinks=True):
        visible = {name: os.path.realpath(Path(place, name)) for name in _visible(directories)}
        directories[:] = [name for name, real in visible.items() if real not in seen]
        seen.update(visible.values())
        for name in _visible(files):
            path = Path(place, name)
            if path.suffix.lower() in suffixes:
                yield path
            else:
                skipped.add("another kind of file", path.relative_to(root).as_posix())


def _visible(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))
