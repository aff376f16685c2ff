"""Turns one example into what a model eats."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedra_edge.data.dataset import Example, TextExample
from fedra_edge.data.images import prepare_image
from fedra_edge.data.tokenizing import TextTokenizer
from fedra_edge.errors import DataError
from fedra_edge.protocol.models import ImageInput, ModelInput

Inputs = NDArray[Any]
"""An image of shape (channels, size, size) or token ids of shape (tokens,), or a batch of them."""


class WrongKindError(DataError):
    """The data are images and the model reads texts, or the other way round."""

    def __init__(self, wanted: str, given: str) -> None:
        super().__init__(
            f"the model reads {wanted}, but the local data are {given}",
            remedy=f"Give a directory or a CSV file of {wanted}.",
        )


def prepare_example(
    example: Example | TextExample, wanted: ModelInput, tokenizer: TextTokenizer | None
) -> Inputs:
    """Prepare an image or a text for a model; one that reads texts comes with its tokenizer.

    Raises:
        WrongKindError: The example is of another kind than the model reads.
        DataError: The image or text is none.
    """
    if isinstance(wanted, ImageInput):
        return prepare_image(image_of(example), wanted)
    if tokenizer is None:
        raise ValueError("a model that reads texts needs its tokenizer")
    return tokenizer.encode(text_of(example))


def image_of(example: Example | TextExample) -> NDArray[np.uint8]:
    """Give the image of an example; WrongKindError when it is a text."""
    if isinstance(example, TextExample):
        raise WrongKindError("images", "texts")
    return example.image


def text_of(example: Example | TextExample) -> str:
    """Give the text of an example; WrongKindError when it is an image."""
    if isinstance(example, TextExample):
        return example.text
    raise WrongKindError("texts", "images")
