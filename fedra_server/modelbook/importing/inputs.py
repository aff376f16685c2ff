"""Finds out what a model that is only there as ONNX eats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto
from pydantic import ValidationError

from fedra_edge.protocol.models import ImageInput, ModelInput, TokenInput
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.importing.probing import MIN_TOKENS
from fedra_server.modelbook.importing.reading import FlatGraph
from fedra_server.storage.blobs import BlobStore

DEFAULT_MAX_TOKENS: Final = 512
_IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
_IMAGENET_STD: Final = (0.229, 0.224, 0.225)
_IMAGE_AXES: Final = 4
_SAME_IDS: Final = frozenset({"Cast", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Preparation:
    """What the file does not say of how its input is made; None where the default will do."""

    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    tokenizer: Path | None = None
    max_tokens: int | None = None


def find_onnx_input(graph: FlatGraph, given: Preparation, blobs: BlobStore) -> ModelInput:
    """Tell from a graph's inputs what it eats, and store the tokenizer of one that reads texts.

    Raises:
        ConfigurationError: It is something that clients cannot prepare, or something is not said.
        StorageError: The blob store refused the tokenizer.
    """
    first = graph.inputs[0].type.tensor_type if graph.inputs else None
    try:
        if first is not None and first.elem_type in {TensorProto.INT64, TensorProto.INT32}:
            return _token_input(graph, given, blobs)
        if first is not None and first.elem_type == TensorProto.FLOAT:
            return _image_input(first.shape, given)
    except ValidationError as error:
        told = error.errors()[0]
        field = ".".join(map(str, told["loc"]))
        raise ConfigurationError(f"the input is not supported: {field}: {told['msg']}") from error
    raise ConfigurationError(
        "the model takes neither images (float32) nor token ids (int64)",
        remedy="Export it with its plain input, in float32.",
    )


def _image_input(shape: onnx.TensorShapeProto, given: Preparation) -> ImageInput:
    sizes = [dim.dim_value for dim in shape.dim]
    if len(sizes) != _IMAGE_AXES:
        raise ConfigurationError(
            f"images have the axes examples, channels, height and width; the input has {len(sizes)}"
        )
    if sizes[0]:
        raise ConfigurationError(
            f"the model takes batches of exactly {sizes[0]}",
            remedy="Export it with a dynamic batch axis.",
        )
    _, channels, height, width = sizes
    size = given.image_size or height
    if not size or {height, width} - {0, size}:
        raise ConfigurationError(
            f"images must be square and of one size, not {height or '?'} x {width or '?'}",
            remedy="Say it with --image-size, or export the model for such images.",
        )
    is_colour = channels in {0, len(_IMAGENET_MEAN)}
    mean = given.mean or (_IMAGENET_MEAN if is_colour else (0.5,))
    std = given.std or (_IMAGENET_STD if is_colour else (0.5,))
    channels = channels or len(mean)
    if len(mean) != channels or len(std) != channels:
        raise ConfigurationError(
            f"--image-mean and --image-std need {channels} values each",
            remedy="Give one for each channel, such as --image-mean 0.5,0.5,0.5.",
        )
    return ImageInput.model_validate(
        {"size_px": size, "channels": channels, "mean": mean, "std": std}
    )


def _token_input(graph: FlatGraph, given: Preparation, blobs: BlobStore) -> TokenInput:
    if given.tokenizer is None:
        raise ConfigurationError(
            "the model reads token ids", remedy="Give its tokenizer: --tokenizer tokenizer.json."
        )
    max_tokens = DEFAULT_MAX_TOKENS if given.max_tokens is None else given.max_tokens
    if max_tokens < MIN_TOKENS:
        raise ConfigurationError(
            f"texts of {max_tokens} tokens are too short to tell how the model treats lengths",
            remedy=f"Give at least {MIN_TOKENS} with --max-tokens.",
        )
    from fedra_server.modelbook.tokenizing import check_vocabulary, open_tokenizer

    vocabulary_size = _vocabulary_size(graph)
    check_vocabulary(open_tokenizer(given.tokenizer), vocabulary_size)
    return TokenInput(
        vocabulary_size=vocabulary_size,
        max_tokens=max_tokens,
        tokenizer=blobs.put_bytes(given.tokenizer.read_bytes()),
    )


def _vocabulary_size(graph: FlatGraph) -> int:
    """Count the embeddings that are looked up by the ids."""
    ids = {"input_ids"}
    for node in graph.nodes:
        if node.op_type in _SAME_IDS and node.input[0] in ids:
            ids.update(node.output)
        if node.op_type == "Gather" and node.input[0] in graph.weights and node.input[1] in ids:
            return int(graph.weights[node.input[0]].shape[0])
    raise ConfigurationError(
        "the model has no input input_ids that picks embeddings",
        remedy="Export it with the inputs input_ids and attention_mask.",
    )
