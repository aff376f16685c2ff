"""A folder with one directory of images per class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedra_edge.data.dataset import Example, SkipReport
from fedra_edge.data.images import IMAGE_SUFFIXES, problem_of_image, read_image
from fedra_edge.errors import DataError


class _Entry(NamedTuple):
    path: str  # relative to the root, with forward slashes
    label: str
    held_out: bool | None


class ImageFolder:
    """``DIR/CLASS/...`` or, with a held-out part of its own, ``DIR/{train,test}/CLASS/...``.

    A class is named by its directory; images may lie deeper. Links are followed once, hidden
    files are ignored, and whatever is no image is counted in ``skipped``.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(
                f"{self.root} is no directory",
                remedy="Give a directory that holds one directory of images per class.",
            )
        self.skipped = SkipReport()
        self._entries = sorted(self._list())

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        entry = self._entries[index]
        return Example(read_image(self.root / entry.path), entry.label)

    def label_of(self, index: int) -> str:
        """Give the name of the class directory."""
        return self._entries[index].label

    def key_of(self, index: int) -> str:
        """Give the path below the folder, with forward slashes."""
        return self._entries[index].path

    def is_held_out(self, index: int) -> bool | None:
        """Tell whether the image lies under ``test``; None when the folder has no such part."""
        return self._entries[index].held_out

    def problem_of(self, index: int) -> str | None:
        """Try to decode the image and say why it cannot be used."""
        return problem_of_image(self.root / self._entries[index].path)

    def _list(self) -> Iterator[_Entry]:
        if not _is_split(self.root):
            yield from self._list_classes(self.root, held_out=None)
            return
        has_test = (self.root / "test").is_dir()
        yield from self._list_classes(self.root / "train", held_out=False if has_test else None)
        if has_test:
            yield from self._list_classes(self.root / "test", held_out=True)

    def _list_classes(self, directory: Path, *, held_out: bool | None) -> Iterator[_Entry]:
        for child in _children(directory):
            if not child.is_dir():
                self.skipped.add("file outside any class directory", self._name(child))
                continue
            paths = list(self._list_images(child, seen=set()))
            if not paths:
                self.skipped.add("class directory without images", self._name(child))
            for path in paths:
                yield _Entry(self._name(path), child.name.strip(), held_out)

    def _list_images(self, directory: Path, seen: set[str]) -> Iterator[Path]:
        real = os.path.realpath(directory)
        if real in seen:
            self.skipped.add("link to a directory that was already read", self._name(directory))
            return
        seen.add(real)
        for child in _children(directory):
            if child.is_dir():
                yield from self._list_images(child, seen)
            elif child.suffix.lower() in IMAGE_SUFFIXES:
                yield child
            else:
                self.skipped.add("not an image file", self._name(child))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


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
