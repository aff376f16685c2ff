"""A folder with one directory of images per class."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fedra_edge.data.class_folder import ClassFolder
from fedra_edge.data.dataset import Example
from fedra_edge.data.images import IMAGE_SUFFIXES, problem_of_image, read_image


class ImageFolder(ClassFolder):
    """``DIR/CLASS/...`` or ``DIR/{train,test}/CLASS/...`` of images."""

    noun: ClassVar[str] = "image"
    article: ClassVar[str] = "an"
    suffixes: ClassVar[frozenset[str]] = IMAGE_SUFFIXES

    def __getitem__(self, index: int) -> Example:
        return Example(read_image(self.path_of(index)), self.label_of(index))

    @override
    def problem_of(self, index: int) -> str | None:
        """Try to decode the image and say why it cannot be used."""
        return problem_of_image(self.path_of(index))
