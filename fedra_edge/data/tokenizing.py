"""Turns texts into the token ids that a model eats, with the tokenizer that came with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fedra_edge.errors import BackendUnavailableError, DataError, SliceError
from fedra_edge.protocol.models import TokenInput

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

PADDING: Final = -1
"""Fills up the shorter texts of a batch; no token has this id."""


class TextTokenizer:
    """Reads texts as a model does.

    Args:
        path: The model's tokenizer.json.
        wanted: What the model eats.

    Raises:
        BackendUnavailableError: The library that reads tokenizers is not installed.
        SliceError: The file holds no tokenizer, or one that leaves no room for a text.
    """

    def __init__(self, path: Path, wanted: TokenInput) -> None:
        self._tokenizer = _open(path)
        if self._tokenizer.num_special_tokens_to_add(is_pair=False) >= wanted.max_tokens:
            raise SliceError("the model's tokenizer fills all tokens before it comes to the text")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(wanted.max_tokens)
        self.max_tokens = wanted.max_tokens
        self._vocabulary_size = wanted.vocabulary_size

    def cuts(self, text: str) -> bool:
        """Tell whether a text is longer than what the model sees of it.

        Raises:
            DataError: There is nothing in the text that the model could see.
        """
        return bool(self._encoded(text).overflowing)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Give token ids of shape (tokens,).

        Raises:
            SliceError: The tokenizer knows more tokens than the model.
            DataError: There is nothing in the text that the model could see.
        """
        ids = np.asarray(self._encoded(text).ids, dtype=np.int64)
        if ids.max() >= self._vocabulary_size:
            raise SliceError("the model's tokenizer gives tokens that the model does not know")
        return ids

    def _encoded(self, text: str) -> Encoding:
        try:
            encoding = self._tokenizer.encode(text)
        except BaseException as error:  # its panics are no Exception
            _let_pass_what_ends_programs(error)
            raise DataError("text that the model's tokenizer cannot read") from error
        if not encoding.ids:
            raise DataError("text has no token")
        return encoding


def padded(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Make a batch of token ids, of shape (texts, tokens), as long as the longest text."""
    longest = max((len(row) for row in rows), default=0)
    batch = np.full((len(rows), longest), PADDING, dtype=np.int64)
    for number, row in enumerate(rows):
        batch[number, : len(row)] = row
    return batch


def _open(path: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BackendUnavailableError(
            "the model reads texts, which needs the package tokenizers",
            remedy="pip install 'fedra[text]'",
        ) from error
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises nothing more precise, and panics
        _let_pass_what_ends_programs(error)
        raise SliceError(f"{path.name} holds no tokenizer: {error}") from error
    return tokenizer


def _let_pass_what_ends_programs(error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
