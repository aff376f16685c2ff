"""The pieces of a vision transformer as ONNX graphs (arXiv 2010.11929)."""

from __future__ import annotations

import onnx

from fedra_edge.protocol.graphs import HIDDEN, INPUTS, LOGITS, OUT
from fedra_edge.protocol.vit import VitSettings
from fedra_server.modelbook.graphs.parts import BATCH, activation, hidden_input, layer_norm, linear
from fedra_server.modelbook.graphs.writing import GraphWriter


def vit_stem(settings: VitSettings) -> onnx.ModelProto:
    """Embed patches, the class token and positions (equation 1)."""
    graph = GraphWriter("vit_stem")
    width, patch, size = settings.hidden_size, settings.patch_size, settings.image_size
    tokens = _num_tokens(settings)
    images = graph.input(INPUTS, [BATCH, settings.num_channels, size, size])
    projection = "patch_embeddings.projection"
    kernel = graph.input(f"{projection}.weight", [width, settings.num_channels, patch, patch])
    bias = graph.input(f"{projection}.bias", [width])
    grid = graph.add("Conv", images, kernel, bias, strides=[patch, patch])
    rows = graph.add("Reshape", grid, graph.ints(0, width, tokens - 1))
    patches = graph.add("Transpose", rows, perm=[0, 2, 1])
    each = graph.add("Concat", graph.add("Shape", images, end=1), graph.ints(1, width), axis=0)
    first = graph.add("Expand", graph.input("cls_token", [1, 1, width]), each)
    joined = graph.add("Concat", first, patches, axis=1)
    positions = graph.input("position_embeddings", [1, tokens, width])
    graph.output(graph.add("Add", joined, positions), HIDDEN, [BATCH, tokens, width])
    return graph.model()


def vit_block(settings: VitSettings) -> onnx.ModelProto:
    """Compute one pre-norm layer (equations 2 and 3)."""
    graph = GraphWriter("vit_block")
    width, inner, eps = settings.hidden_size, settings.intermediate_size, settings.layer_norm_eps
    tokens = _num_tokens(settings)
    hidden = hidden_input(graph, tokens, width)
    attended = _attention(
        graph, layer_norm(graph, hidden, "layernorm_before", width, eps), settings
    )
    residual = graph.add("Add", attended, hidden)
    states = layer_norm(graph, residual, "layernorm_after", width, eps)
    states = linear(graph, states, "mlp.fc1", (inner, width), bias=True)
    states = activation(graph, states, settings.hidden_act)
    states = linear(graph, states, "mlp.fc2", (width, inner), bias=True)
    graph.output(graph.add("Add", states, residual), OUT, [BATCH, tokens, width])
    return graph.model()


def vit_head(settings: VitSettings, num_labels: int) -> onnx.ModelProto:
    """Classify by the normed class token (equation 4)."""
    graph = GraphWriter("vit_head")
    width = settings.hidden_size
    hidden = hidden_input(graph, _num_tokens(settings), width)
    first = graph.add("Slice", hidden, graph.ints(0), graph.ints(1), graph.ints(1))
    states = graph.add("Squeeze", first, graph.ints(1))
    states = layer_norm(graph, states, "layernorm", width, settings.layer_norm_eps)
    logits = linear(graph, states, "classifier", (num_labels, width), bias=True)
    graph.output(logits, LOGITS, [BATCH, num_labels])
    return graph.model()


def _attention(graph: GraphWriter, states: str, settings: VitSettings) -> str:
    """Attend to all tokens with every head; queries carry the scale of the scores."""
    width, heads = settings.hidden_size, settings.num_attention_heads
    head_dim = width // heads

    def project(name: str, perm: list[int]) -> str:
        projected = linear(
            graph, states, f"attention.{name}", (width, width), bias=settings.qkv_bias
        )
        split = graph.add("Reshape", projected, graph.ints(0, 0, heads, head_dim))
        return graph.add("Transpose", split, perm=perm)

    query = graph.add("Mul", project("q_proj", [0, 2, 1, 3]), graph.floats(head_dim**-0.5))
    scores = graph.add("MatMul", query, project("k_proj", [0, 2, 3, 1]))
    weights = graph.add("Softmax", scores, axis=-1)
    mixed = graph.add("MatMul", weights, project("v_proj", [0, 2, 1, 3]))
    rows = graph.add("Transpose", mixed, perm=[0, 2, 1, 3])
    joined = graph.add("Reshape", rows, graph.ints(0, 0, width))
    return linear(graph, joined, "attention.o_proj", (width, width), bias=True)


def _num_tokens(settings: VitSettings) -> int:
    return (settings.image_size // settings.patch_size) ** 2 + 1
