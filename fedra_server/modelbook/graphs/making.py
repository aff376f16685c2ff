"""Makes the graphs that clients without PyTorch compute with, and puts them into the blob store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from pydantic import ValidationError

from fedra_edge.protocol.graphs import GRADIENT_SUFFIX, HIDDEN, LOGITS, OPERATORS, OUT
from fedra_edge.protocol.layers import LORA_A, LORA_B
from fedra_edge.protocol.llama import LlamaSettings
from fedra_edge.protocol.models import PieceGraphs
from fedra_edge.protocol.vit import VitSettings
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.gradients.vjp import vjp_graph
from fedra_server.modelbook.graphs.adapters import place_adapters
from fedra_server.modelbook.graphs.llama import llama_block, llama_head, llama_stem
from fedra_server.modelbook.graphs.vit import vit_block, vit_head, vit_stem
from fedra_server.storage.blobs import BlobStore


@dataclass(frozen=True)
class ForwardGraphs:
    """What a model's pieces compute, without adapters."""

    stem: onnx.ModelProto
    block: onnx.ModelProto
    head: onnx.ModelProto


@dataclass(frozen=True)
class FinishedGraphs:
    """All graphs of a model, as the wire contract has them, not stored yet."""

    targets: tuple[str, ...]
    stem: onnx.ModelProto
    block: onnx.ModelProto
    block_vjp: onnx.ModelProto
    head: onnx.ModelProto
    head_vjp: onnx.ModelProto


def forward_graphs(family: str, config: Mapping[str, Any], num_labels: int) -> ForwardGraphs:
    """Write the graphs of a family's pieces from a model's configuration.

    Raises:
        ConfigurationError: No graphs can be written for this family or configuration.
    """
    try:
        return _forward_graphs(family, config, num_labels)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigurationError(f"{field} in config.json: {first['msg']}") from error


def _forward_graphs(family: str, config: Mapping[str, Any], num_labels: int) -> ForwardGraphs:
    if family == "vit":
        vit = VitSettings.model_validate(config)
        return ForwardGraphs(vit_stem(vit), vit_block(vit), vit_head(vit, num_labels))
    if family == "llama":
        llama = LlamaSettings.model_validate(config)
        return ForwardGraphs(llama_stem(llama), llama_block(llama), llama_head(llama, num_labels))
    raise ConfigurationError(f"no ONNX graphs can be written for models of family {family}")


def finish_graphs(
    forward: ForwardGraphs, targets: Sequence[str], head_parameters: Sequence[str]
) -> FinishedGraphs:
    """Place adapters and derive the gradients.

    Raises:
        ConfigurationError: A target is no linear layer, an operator has no known gradient, or
            no client computes it.
    """
    block, block_vjp = adapt_block(forward.block, targets)
    head_vjp = vjp_graph(forward.head, LOGITS, gradient_names((HIDDEN, *head_parameters)))
    _check_operators(forward.stem, forward.head, head_vjp)
    return FinishedGraphs(
        targets=tuple(targets),
        stem=forward.stem,
        block=block,
        block_vjp=block_vjp,
        head=forward.head,
        head_vjp=head_vjp,
    )


def store_graphs(graphs: FinishedGraphs, blobs: BlobStore) -> PieceGraphs:
    """Put the graphs into the blob store; the same graphs always are the same bytes.

    Raises:
        StorageError: The blob store refused one.
    """
    return PieceGraphs(
        targets=graphs.targets,
        stem=blobs.put_bytes(pack_graph(graphs.stem)),
        block=blobs.put_bytes(pack_graph(graphs.block)),
        block_vjp=blobs.put_bytes(pack_graph(graphs.block_vjp)),
        head=blobs.put_bytes(pack_graph(graphs.head)),
        head_vjp=blobs.put_bytes(pack_graph(graphs.head_vjp)),
    )


def _check_operators(*graphs: onnx.ModelProto) -> None:
    odd = sorted({node.op_type for graph in graphs for node in graph.graph.node} - OPERATORS)
    if odd:
        raise ConfigurationError(
            f"no client computes the operator {odd[0]}",
            remedy="Export the model without it.",
        )


def adapt_block(
    block: onnx.ModelProto, targets: Sequence[str]
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Give a layer's graph with adapters, and the graph of its gradients.

    Raises:
        ConfigurationError: A target is no linear layer, an operator has no known gradient, or
            no client computes it.
    """
    adapted = place_adapters(block, targets)
    vjp = vjp_graph(adapted, OUT, block_gradients(targets))
    _check_operators(adapted, vjp)
    return adapted, vjp


def block_gradients(targets: Sequence[str]) -> dict[str, str]:
    """Name the gradients of a layer by what they are taken of."""
    factors = [f"{target}.{factor}" for target in targets for factor in (LORA_A, LORA_B)]
    return gradient_names((HIDDEN, *factors))


def gradient_names(inputs: Sequence[str]) -> dict[str, str]:
    """Name gradients by what they are taken of."""
    return {name: f"{name}{GRADIENT_SUFFIX}" for name in inputs}


def pack_graph(graph: onnx.ModelProto) -> bytes:
    """Give the bytes of a graph; the same graph always has the same."""
    packed: bytes = graph.SerializeToString(deterministic=True)
    return packed
