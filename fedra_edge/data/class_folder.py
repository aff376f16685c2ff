"""A folder with one directory of files per class, whatever the files hold."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

from fedra_edge.data.dataset import SkipReport
from fedra_edge.errors import DataError


class _Entry(NamedTuple):
    path: str  # relative to the root, with forward slashes
    label: str
    held_out: bool | None


class ClassFolder(ABC):
    """``DIR/CLASS/...`` or, with a held-out part of its own, ``DIR/{train,test}/CLASS/...``.

    A class is named by its directory; files may lie deeper. Links are followed, but a file
    counts once, at its own place when that is in the folder. Hidden files are ignored, and
    whatever is left out is counted in ``skipped``.
    """

    noun: ClassVar[str]
    """What to call one file's content, after its article."""
    article: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    """How the names of the files end that are read, in lower case."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(
                f"{self.root} is no directory",
                remedy=f"Give a directory that holds one directory of {self.noun}s per class.",
            )
        self.skipped = SkipReport()
        self._entries = sorted(self._without_repeats(self._list()))

    def __len__(self) -> int:
        return len(self._entries)

    def label_of(self, index: int) -> str:
        """Give the name of the class directory."""
        return self._entries[index].label

    def key_of(self, index: int) -> str:
        """Give the path below the folder, with forward slashes."""
        return self._entries[index].path

    def is_held_out(self, index: int) -> bool | None:
        """Tell whether the file lies under ``test``; None when the folder has no such part."""
        return self._entries[index].held_out

    def path_of(self, index: int) -> Path:
        """Give the file."""
        return self.root / self._entries[index].path

    @abstractmethod
    def problem_of(self, index: int) -> str | None:
        """Try to read the file and say why it cannot be used; None when it can."""

    def _list(self) -> Iterator[_Entry]:
        held_out_by_part: dict[Path, bool | None] = {self.root: None}
        if _is_split(self.root):
            has_test = (self.root / "test").is_dir()
            held_out_by_part = {self.root / "train": False if has_test else None}
            if has_test:
                held_out_by_part[self.root / "test"] = True
        classes = [
            (child, held_out)
            for part, held_out in held_out_by_part.items()
            for child in self._class_directories(part)
        ]
        listed = _with_parents(self.root)
        listed.update(os.path.realpath(place) for place in held_out_by_part)
        listed.update(os.path.realpath(child) for child, _ in classes)
        for child, held_out in classes:
            paths = list(self._list_files(child, set(listed)))
            if not paths:
                self.skipped.add(f"class directory without {self.noun}s", self._name(child))
            for path in paths:
                yield _Entry(self._name(path), child.name.strip(), held_out)

    def _class_directories(self, part: Path) -> Iterator[Path]:
        for child in _children(part):
            if child.is_dir():
                yield child
            else:
                self.skipped.add("file outside any class directory", self._name(child))

    def _list_files(self, directory: Path, listed: set[str]) -> Iterator[Path]:
        """Yield what lies in a directory; those in ``listed`` are not entered (again)."""
        for child in _children(directory):
            if child.is_dir():
                real = os.path.realpath(child)
                if real in listed:
                    reason = "link to a directory that was already read"
                    self.skipped.add(reason, self._name(child))
                    continue
                listed.add(real)
                yield from self._list_files(child, listed)
            elif child.suffix.lower() in self.suffixes:
                yield child
            else:
                self.skipped.add(f"not {self.article} {self.noun} file", self._name(child))

    def _without_repeats(self, entries: Iterable[_Entry]) -> Iterator[_Entry]:
        """Keep each file once; its own place goes before links, which may name another class."""
        root = os.path.realpath(self.root)
        found = []
        for entry in entries:
            file = os.path.realpath(self.root / entry.path)
            is_link = Path(file) != Path(root, entry.path)
            found.append((is_link, entry, file))
        seen: set[str] = set()
        for _, entry, file in sorted(found):
            if file in seen:
                self.skipped.add(
                    f"link to {self.article} {self.noun} that was already read", entry.path
                )
                continue
            seen.add(file)
            yield entry

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _with_parents(directory: Path) -> set[str]:
    real = Path(os.path.realpath(directory))
    return {str(real), *map(str, real.parents)}


def _is_split(root: Path) -> bool:
    parts = {child.name for child in _children(root) if child.is_dir()}
    if "train" not in parts or not parts <= {"train", "test"}:
        return False
    return any(child.is_dir() for child in _children(root / "train"))


def _children(directory: Path) -> list[Path]:
    try:
        children = sorted(directory.iterdir())
    except OSError as error:
        raise DataError(
            f"{directory} cannot be listed: {error.strerror}",
            remedy="Let the user that runs the client read this directory.",
        ) from error
    return [child for child in children if not child.name.startswith(".")]
