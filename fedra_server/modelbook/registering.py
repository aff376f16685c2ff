"""Registers a model: loads it, cuts it into content-addressed pieces, records what they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_edge.protocol.models import ImageInput, ModelSpec, Piece, PieceCost
from fedra_edge.protocol.tensors import serialize_tensors
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.costing import Stage, StageCost, measure_costs
from fedra_server.modelbook.loading import find_family, load_model, read_json
from fedra_server.modelbook.splitting import Arrays, linear_shapes, split_model
from fedra_server.storage.blobs import BlobStore

_VOLATILE: Final = ("_name_or_path", "transformers_version")
_BYTE_SCALE: Final = 1 / 255
_SCALE_TOLERANCE: Final = 1e-6


def register_model(path: Path, name: str, blobs: BlobStore) -> ModelSpec:
    """Cut the model in a Hugging Face directory into pieces and put them into the blob store.

    The same directory always gives the same ModelSpec on the same machine.

    Raises:
        ConfigurationError: The directory holds no model that we can cut.
        StorageError: The blob store refused a piece.
    """
    family = find_family(path)
    model = load_model(path, family)
    config = _plain_config(model.config.to_dict())
    labels = _labels({int(key): label for key, label in (model.config.id2label or {}).items()})
    wanted = _image_input(path, config)
    pieces = split_model(model, family)
    block_linears = linear_shapes(model, family)
    stored = _store(pieces, measure_costs(model, family, wanted), blobs)
    head_parameters = {key: pieces[HEAD][key].shape for key in family.head_parameters}
    try:
        return ModelSpec(
            name=name,
            family=family.name,
            config=config,
            labels=labels,
            input=wanted,
            stem=stored[STEM],
            layers=_layers(stored),
            head=stored[HEAD],
            block_linears=block_linears,
            default_targets=family.default_targets,
            head_parameters=head_parameters,
        )
    except ValidationError as error:
        raise ConfigurationError(f"the model cannot be registered: {error}") from error


def _store(
    pieces: Mapping[str, Arrays], costs: Mapping[Stage, StageCost], blobs: BlobStore
) -> dict[str, Piece]:
    stored = {}
    for piece, arrays in pieces.items():
        cost = costs[_stage_of(piece)]
        stored[piece] = Piece(
            weights=blobs.put_bytes(serialize_tensors(arrays)),
            cost=PieceCost(
                parameter_bytes=sum(array.nbytes for array in arrays.values()),
                activation_bytes=cost.activation_bytes,
                boundary_bytes=cost.boundary_bytes,
                forward_flops=cost.forward_flops,
            ),
        )
    return stored


def _stage_of(piece: str) -> Stage:
    if piece == STEM:
        return "stem"
    return "head" if piece == HEAD else "layer"


def _layers(stored: Mapping[str, Piece]) -> tuple[Piece, ...]:
    num_layers = len(stored) - 2  # all but stem and head
    return tuple(stored[layer_piece(LayerId(index))] for index in range(num_layers))


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what defines the architecture, and say float32, which is what the pieces are."""
    plain = {key: value for key, value in config.items() if key not in _VOLATILE}
    loaded: dict[str, Any] = json.loads(json.dumps(plain | {"dtype": "float32"}))
    return loaded


def _labels(id2label: Mapping[int, str]) -> tuple[str, ...]:
    labels = tuple(id2label[index] for index in sorted(id2label))
    if sorted(id2label) != list(range(len(labels))) or len(set(labels)) != len(labels):
        raise ConfigurationError("id2label must number distinct labels from 0 without a gap")
    return labels


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
