"""Registers a model: loads it, cuts it into content-addressed pieces, records what they cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from transformers import PreTrainedModel

from fedra_edge.protocol.families import Family
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_edge.protocol.models import ModelInput, ModelSpec, Piece, PieceCost, PieceGraphs
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.costing import Stage, StageCost, measure_costs
from fedra_server.modelbook.inputs import find_input
from fedra_server.modelbook.loading import find_family, load_model
from fedra_server.modelbook.packing import pack_piece
from fedra_server.modelbook.splitting import Arrays, linear_shapes, split_model
from fedra_server.modelbook.stored_dtypes import WeightsDtype
from fedra_server.storage.blobs import BlobStore

_VOLATILE: Final = ("_name_or_path", "transformers_version")


def register_model(
    path: Path,
    name: str,
    blobs: BlobStore,
    weights_dtype: WeightsDtype = "float32",
    *,
    max_tokens: int | None = None,
    with_graphs: bool = True,
) -> ModelSpec:
    """Cut the model in a Hugging Face directory into pieces and put them into the blob store.

    Frozen weights are stored in ``weights_dtype``; the head's trained tensors, which a run
    starts from, in float32. A model that reads texts gets at most ``max_tokens`` of each; None
    means ``DEFAULT_MAX_TOKENS``, or fewer where it has fewer positions. The same directory always
    gives the same ModelSpec on the same machine, and another one for each dtype. Graphs for
    clients without PyTorch are made, and held against PyTorch, unless ``with_graphs`` is False.

    Raises:
        ConfigurationError: The directory holds no model that we can cut, a weight does not
            fit into the dtype, or the graphs cannot be made.
        StorageError: The blob store refused a piece.
    """
    family = find_family(path)
    model = load_model(path, family)
    config = _plain_config(model.config.to_dict())
    labels = _labels({int(key): label for key, label in (model.config.id2label or {}).items()})
    wanted = find_input(path, config, family, blobs, max_tokens)
    pieces = split_model(model, family)
    block_linears = linear_shapes(model, family)
    costs = measure_costs(model, family, wanted)
    graphs = _graphs(model, family, wanted, pieces, blobs) if with_graphs else None
    stored = _store(pieces, costs, blobs, family, weights_dtype)
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
            graphs=graphs,
        )
    except ValidationError as error:
        raise ConfigurationError(f"the model cannot be registered: {error}") from error


def _graphs(
    model: PreTrainedModel,
    family: Family,
    wanted: ModelInput,
    pieces: Mapping[str, Arrays],
    blobs: BlobStore,
) -> PieceGraphs:
    """Make, check and store graphs; leaves the model with its first layer only."""
    from fedra_server.modelbook.graphs.making import finish_graphs, forward_graphs, store_graphs
    from fedra_server.modelbook.graphs.verifying import verify_graphs

    try:
        forward = forward_graphs(
            family.name, model.config.to_dict(), len(model.config.id2label or ())
        )
        graphs = finish_graphs(forward, family.default_targets, family.head_parameters)
        verify_graphs(model, family, wanted, pieces, graphs)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"no graphs for clients without PyTorch can be made of this model: {error}",
            remedy="--no-graphs registers it for clients with PyTorch only.",
        ) from error
    return store_graphs(graphs, blobs)


def _store(
    pieces: Mapping[str, Arrays],
    costs: Mapping[Stage, StageCost],
    blobs: BlobStore,
    family: Family,
    weights_dtype: WeightsDtype,
) -> dict[str, Piece]:
    stored = {}
    for piece, arrays in pieces.items():
        cost = costs[_stage_of(piece)]
        trained = family.head_parameters if piece == HEAD else ()
        stored[piece] = Piece(
            weights=blobs.put_bytes(pack_piece(arrays, weights_dtype, trained)),
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
    """Keep what defines the architecture, and say float32, which is what it computes in."""
    plain = {key: value for key, value in config.items() if key not in _VOLATILE}
    loaded: dict[str, Any] = json.loads(json.dumps(plain | {"dtype": "float32"}))
    return loaded


def _labels(id2label: Mapping[int, str]) -> tuple[str, ...]:
    labels = tuple(id2label[index] for index in sorted(id2label))
    if sorted(id2label) != list(range(len(labels))) or len(set(labels)) != len(labels):
        raise ConfigurationError("id2label must number distinct labels from 0 without a gap")
    return labels
