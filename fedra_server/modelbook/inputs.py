"""Finds out what a model eats: images by its preprocessor, or tokens by its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from tokenizers import Tokenizer

from fedra_edge.protocol.families import Family
from fedra_edge.protocol.llama import LlamaSettings
from fedra_edge.protocol.models import ImageInput, ModelInput, TokenInput
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.loading import read_json
from fedra_server.modelbook.tokenizing import check_vocabulary, open_tokenizer
from fedra_server.storage.blobs import BlobStore

DEFAULT_MAX_TOKENS: Final = 512
"""Texts are cut here unless told otherwise; many models could take far more than pays."""

_BYTE_SCALE: Final = 1 / 255
_SCALE_TOLERANCE: Final = 1e-6
_PROBE: Final = "Text, 1"


def find_input(
    directory: Path,
    config: Mapping[str, Any],
    family: Family,
    blobs: BlobStore,
    max_tokens: int | None,
) -> ModelInput:
    """Tell what a saved model eats, and store its tokenizer if it has one.

    Raises:
        ConfigurationError: It is something that clients could not prepare or compute.
        StorageError: The blob store refused the tokenizer.
    """
    if family.image_processor is None:
        return _token_input(directory, config, blobs, max_tokens)
    if max_tokens is not None:
        raise ConfigurationError(
            f"a model of family {family.name} reads images, which have no tokens",
            remedy="Leave out --max-tokens.",
        )
    return _image_input(directory, config)


def _token_input(
    directory: Path, config: Mapping[str, Any], blobs: BlobStore, max_tokens: int | None
) -> TokenInput:
    """The length is the one asked for, as far as the model's positions go."""
    vocabulary_size = _check_config(config).vocab_size
    positions = int(config["max_position_embeddings"])
    if max_tokens is not None and max_tokens > positions:
        raise ConfigurationError(
            f"the model was made for texts of up to {positions} tokens, not {max_tokens}",
            remedy=f"Give --max-tokens {positions} or less.",
        )
    path = directory / "tokenizer.json"
    tokenizer = open_tokenizer(path)
    _check_tokenizer(tokenizer, vocabulary_size, config.get("pad_token_id"))
    if max_tokens is not None and max_tokens <= (special := _num_special(tokenizer)):
        raise ConfigurationError(
            f"the tokenizer adds {special} tokens of its own to every text",
            remedy=f"Give --max-tokens {special + 1} or more.",
        )
    try:
        return TokenInput(
            vocabulary_size=vocabulary_size,
            max_tokens=max_tokens or min(DEFAULT_MAX_TOKENS, positions),
            tokenizer=blobs.put_bytes(path.read_bytes()),
        )
    except ValidationError as error:
        raise ConfigurationError(f"the model's input is not supported: {error}") from error


def _check_config(config: Mapping[str, Any]) -> LlamaSettings:
    """Refuse now what every client would have to refuse."""
    try:
        return LlamaSettings.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "config.json"
        raise ConfigurationError(
            f"clients cannot compute this model: {field}: {first['msg']}",
            remedy="Only the plain architecture is supported, for example no stretched positions.",
        ) from error


def _check_tokenizer(tokenizer: Tokenizer, vocabulary_size: int, padding_id: int | None) -> None:
    check_vocabulary(tokenizer, vocabulary_size)
    if padding_id in tokenizer.encode(_PROBE).ids[-1:]:
        raise ConfigurationError(
            "the tokenizer ends every text with the model's padding token, "
            "so transformers would judge a text by the token before it",
            remedy="Give the model a padding token of its own: pad_token_id in config.json.",
        )


def _num_special(tokenizer: Tokenizer) -> int:
    return int(tokenizer.num_special_tokens_to_add(is_pair=False))


def _image_input(directory: Path, config: Mapping[str, Any]) -> ImageInput:
    """Size and channels are the model's own; mean and std come with its preprocessor."""
    size_px, channels = config["image_size"], config["num_channels"]
    if not isinstance(size_px, int):
        raise ConfigurationError(f"images must be square, not {size_px}")
    path = directory / "preprocessor_config.json"
    stated = read_json(path) if path.is_file() else {}
    if abs(stated.get("rescale_factor", _BYTE_SCALE) - _BYTE_SCALE) > _SCALE_TOLERANCE:
        raise ConfigurationError(f"{path}: rescale_factor must be 1/255")
    mean, std = _normalisation(stated, channels)
    try:
        return ImageInput(size_px=size_px, channels=channels, mean=mean, std=std)
    except ValidationError as error:
        raise ConfigurationError(f"the model's input is not supported: {error}") from error


def _normalisation(
    stated: Mapping[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not stated.get("do_normalize", True):
        return (0.0,) * channels, (1.0,) * channels
    mean = tuple(stated.get("image_mean") or (0.5,) * channels)
    std = tuple(stated.get("image_std") or (0.5,) * channels)
    if len(mean) != channels or len(std) != channels:
        raise ConfigurationError(f"image_mean and image_std must have {channels} values")
    return mean, std
