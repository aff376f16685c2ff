"""Registers a model that is only there as ONNX: cut, checked against the file, stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
from pydantic import ValidationError

from fedra_edge.protocol.families import ONNX_FAMILY
from fedra_edge.protocol.graphs import HIDDEN, INPUTS, LOGITS, LORA_SCALE, OUT
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, LORA_A, LORA_B, STEM, layer_piece
from fedra_edge.protocol.models import ModelInput, ModelSpec, Piece, TokenInput
from fedra_edge.protocol.tensors import serialize_tensors
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.graphs.differences import check_by_differences
from fedra_server.modelbook.graphs.making import (
    FinishedGraphs,
    block_gradients,
    finish_graphs,
    gradient_names,
    store_graphs,
)
from fedra_server.modelbook.graphs.running import run_graph
from fedra_server.modelbook.importing.costing import piece_cost
from fedra_server.modelbook.importing.cutting import Region
from fedra_server.modelbook.importing.inputs import Preparation, find_onnx_input
from fedra_server.modelbook.importing.naming import default_targets
from fedra_server.modelbook.importing.probing import MIN_TOKENS, random_inputs
from fedra_server.modelbook.importing.reading import Array, read_graph
from fedra_server.modelbook.importing.splitting import SplitModel, split_graph
from fedra_server.storage.blobs import BlobStore

_TOLERANCE: Final = 1e-4
_EXAMPLES: Final = 3
_TOKENS: Final = MIN_TOKENS
_RANK: Final = 2
_ADAPTER_STD: Final = 0.1


def register_onnx(
    path: Path, name: str, labels: Sequence[str], given: Preparation, blobs: BlobStore
) -> ModelSpec:
    """Cut a model in an ONNX file into pieces and put them into the blob store.

    No PyTorch is needed, here or on the clients. The pieces together must compute what the file
    does, and their gradients agree with finite differences.

    Raises:
        ConfigurationError: The file holds no chain of equal blocks that we can compute and
            differentiate, or the labels are not the model's.
        StorageError: The blob store refused a piece.
    """
    graph = read_graph(path)
    wanted = find_onnx_input(graph, given, blobs)
    model = split_graph(graph, wanted)
    if model.num_labels != len(labels):
        raise ConfigurationError(
            f"the model tells {model.num_labels} labels apart, {len(labels)} are named",
            remedy="Name all of them with --labels, in the order of the model's outputs.",
        )
    targets = default_targets([*model.linears])
    graphs = finish_graphs(model.graphs, targets, model.head_parameters)
    _check_chain(path, model, wanted)
    _check_gradients(model, graphs, wanted)
    head = model.weights[HEAD]
    try:
        return ModelSpec(
            name=name,
            family=ONNX_FAMILY,
            config={},
            labels=tuple(labels),
            input=wanted,
            stem=_store(model, model.stem, STEM, wanted, blobs),
            layers=tuple(
                _store(model, model.block, layer_piece(LayerId(index)), wanted, blobs)
                for index in range(model.num_layers)
            ),
            head=_store(model, model.head, HEAD, wanted, blobs),
            block_linears=model.linears,
            default_targets=targets,
            head_parameters={key: head[key].shape for key in model.head_parameters},
            graphs=store_graphs(graphs, blobs),
        )
    except ValidationError as error:
        raise ConfigurationError(f"the model cannot be registered: {error}") from error


def _store(
    model: SplitModel, region: Region, piece: str, wanted: ModelInput, blobs: BlobStore
) -> Piece:
    weights = model.weights[piece]
    cost = piece_cost(model.tracer, region, weights, wanted)
    return Piece(weights=blobs.put_bytes(serialize_tensors(weights)), cost=cost)


def _check_chain(path: Path, model: SplitModel, wanted: ModelInput) -> None:
    """Compare the pieces, one after the other, with the whole, on batches of several sizes."""
    whole = onnx.load(path)
    for examples in (1, _EXAMPLES):
        _compare(whole, model, random_inputs(wanted, examples, _TOKENS, seed=1))
    if isinstance(wanted, TokenInput):
        longest = wanted.max_tokens
        for examples, tokens in ((2, (_TOKENS + longest) // 2), (1, longest)):
            try:
                _compare(whole, model, random_inputs(wanted, examples, tokens, seed=1))
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"the model cannot be taken for texts of {tokens} tokens: {error}",
                    remedy="Give fewer with --max-tokens: no more than the model has positions, "
                    "nor than a window of its attention holds.",
                ) from error


def _compare(whole: onnx.ModelProto, model: SplitModel, inputs: Array) -> None:
    results = run_graph(whole, _named_inputs(whole, inputs))
    expected = results.get(LOGITS, next(iter(results.values())))
    values = _walk(model, inputs, model.num_layers)
    found = run_graph(model.graphs.head, {**values, **model.weights[HEAD]})[LOGITS]
    differs_by = float(np.abs(found - expected).max())
    if not differs_by <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ConfigurationError(
            f"the pieces together give logits that differ by {differs_by:.1e} from the file's",
            remedy="Export the model for inference, in float32, without random operators.",
        )


def _check_gradients(model: SplitModel, graphs: FinishedGraphs, wanted: ModelInput) -> None:
    """Hold the gradients of the first block and the head against finite differences."""
    generator = np.random.default_rng(0)
    adapters: dict[str, Array] = {LORA_SCALE: np.array(1.0, np.float32)}
    for target in graphs.targets:
        out_features, in_features = model.linears[target]
        shapes = {LORA_A: (_RANK, in_features), LORA_B: (out_features, _RANK)}
        for factor, shape in shapes.items():
            drawn = generator.normal(0, _ADAPTER_STD, shape)
            adapters[f"{target}.{factor}"] = drawn.astype(np.float32)
    values = _walk(model, random_inputs(wanted, 2, _TOKENS), 0)
    layer = {**values, **model.weights[layer_piece(LayerId(0))], **adapters}
    check_by_differences(graphs.block, graphs.block_vjp, block_gradients(graphs.targets), layer)
    head = {**values, **model.weights[HEAD]}
    of_head = gradient_names((HIDDEN, *model.head_parameters))
    check_by_differences(graphs.head, graphs.head_vjp, of_head, head)


def _walk(model: SplitModel, inputs: Array, num_layers: int) -> dict[str, Array]:
    """Bring a batch through stem and layers; give what enters next, and the contexts."""
    values = run_graph(model.graphs.stem, {INPUTS: inputs, **model.weights[STEM]})
    for index in range(num_layers):
        layer = {**values, **model.weights[layer_piece(LayerId(index))]}
        values[HIDDEN] = run_graph(model.graphs.block, layer)[OUT]
    return values


def _named_inputs(model: onnx.ModelProto, inputs: Array) -> dict[str, Array]:
    """Give a whole model its inputs by their own names."""
    if inputs.dtype == np.float32:
        known = {it.name for it in model.graph.initializer}
        return {it.name: inputs for it in model.graph.input if it.name not in known}
    texts = {
        "input_ids": inputs.clip(min=0),
        "attention_mask": (inputs >= 0).astype(np.int64),
        "token_type_ids": np.zeros_like(inputs),
    }
    types = {it.name: it.type.tensor_type.elem_type for it in model.graph.input}
    return {
        name: array.astype(onnx.helper.tensor_dtype_to_np_dtype(types[name]))
        for name, array in texts.items()
        if name in types
    }
