"""A folder with one directory of text files per class."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fedra_edge.data.class_folder import ClassFolder
from fedra_edge.data.dataset import TextExample
from fedra_edge.data.texts import TEXT_SUFFIXES, read_text
from fedra_edge.errors import DataError


class TextFolder(ClassFolder):
    """``DIR/CLASS/...`` or ``DIR/{train,test}/CLASS/...`` of ``.txt`` files in UTF-8."""

    noun: ClassVar[str] = "text"
    article: ClassVar[str] = "a"
    suffixes: ClassVar[frozenset[str]] = TEXT_SUFFIXES

    def __getitem__(self, index: int) -> TextExample:
        return TextExample(read_text(self.path_of(index)), self.label_of(index))

    @override
    def problem_of(self, index: int) -> str | None:
        """Read the text and say why it cannot be used."""
        try:
            read_text(self.path_of(index))
        except DataError as error:
            return str(error)
        return None
