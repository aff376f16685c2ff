"""Opens a tokenizer.json and makes sure that it belongs to a model."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from fedra_server.errors import ConfigurationError


def open_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer in its fast form.

    Raises:
        ConfigurationError: There is none.
    """
    if not path.is_file():
        raise ConfigurationError(
            f"{path.parent} has no {path.name}, which clients need to read texts",
            remedy="Save the tokenizer beside the model in its fast form: "
            "AutoTokenizer.from_pretrained(ORIGINAL, use_fast=True).save_pretrained(DIR).",
        )
    try:
        tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more precise
        raise ConfigurationError(f"{path} holds no tokenizer: {error}") from error
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocabulary_size: int) -> None:
    """Make sure that a model has an embedding for every token.

    Raises:
        ConfigurationError: It has not.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < vocabulary_size:
        raise ConfigurationError(
            f"the tokenizer's ids go up to {largest}, "
            f"the model's {vocabulary_size} embeddings only to {vocabulary_size - 1}",
            remedy="Save the tokenizer that belongs to the model beside it.",
        )
