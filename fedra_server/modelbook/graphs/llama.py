"""The pieces of a Llama-like decoder as ONNX graphs (arXiv 2302.13971, section 2.2).

The stem also gives what only depends on the texts' lengths: cosine and sine of the rotary
positions, the causal mask, and where each text ends. Padding comes last, so a causal mask keeps
it from every real token.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx
from onnx import TensorProto

from fedra_edge.protocol.graphs import HIDDEN, LOGITS, OUT
from fedra_edge.protocol.llama import LlamaSettings
from fedra_server.modelbook.graphs.parts import (
    BATCH,
    TOKENS,
    activation,
    hidden_input,
    linear,
    token_input,
)
from fedra_server.modelbook.graphs.writing import GraphWriter

COSINE: Final = "cosine"
SINE: Final = "sine"
MASK: Final = "mask"
LAST: Final = "last"
_HIDDEN_FROM_VIEW: Final = -1e30
"""Leaves no weight after Softmax, and stays finite whatever score is added to it."""


def llama_stem(settings: LlamaSettings) -> onnx.ModelProto:
    """Embed the tokens, and give the contexts of the layers and of the head."""
    graph = GraphWriter("llama_stem")
    tokens = token_input(graph)
    table = graph.input("weight", [settings.vocab_size, settings.hidden_size])
    hidden = graph.add("Gather", table, graph.add("Max", tokens, graph.index(0)))
    graph.output(hidden, HIDDEN, [BATCH, TOKENS, settings.hidden_size])
    positions = _positions(graph, tokens)
    rows = graph.add("Unsqueeze", positions, graph.ints(1))
    half = settings.head_dim // 2
    angles = graph.add("Mul", _as_float(graph, rows), graph.floats(*_frequencies(settings)))
    graph.output(graph.add("Cos", angles), COSINE, [TOKENS, half])
    graph.output(graph.add("Sin", angles), SINE, [TOKENS, half])
    is_later = graph.add("Greater", positions, rows)
    mask = graph.add("Where", is_later, graph.floats(_HIDDEN_FROM_VIEW), graph.floats(0.0))
    graph.output(mask, MASK, [TOKENS, TOKENS])
    is_real = graph.add("GreaterOrEqual", tokens, graph.index(0))
    lengths = graph.add(
        "ReduceSum",
        graph.add("Cast", is_real, to=TensorProto.INT64),
        graph.ints(1),
        keepdims=0,
    )
    graph.output(graph.add("Sub", lengths, graph.index(1)), LAST, [BATCH], TensorProto.INT64)
    return graph.model()


def llama_block(settings: LlamaSettings) -> onnx.ModelProto:
    """Compute one pre-norm decoder layer."""
    graph = GraphWriter("llama_block")
    width, inner, bias = settings.hidden_size, settings.intermediate_size, settings.mlp_bias
    hidden = hidden_input(graph, TOKENS, width)
    attended = _attention(graph, _rms_norm(graph, hidden, "input_layernorm", settings), settings)
    residual = graph.add("Add", attended, hidden)
    states = _rms_norm(graph, residual, "post_attention_layernorm", settings)
    gate = linear(graph, states, "mlp.gate_proj", (inner, width), bias=bias)
    up = linear(graph, states, "mlp.up_proj", (inner, width), bias=bias)
    gated = graph.add("Mul", activation(graph, gate, settings.hidden_act), up)
    down = linear(graph, gated, "mlp.down_proj", (width, inner), bias=bias)
    graph.output(graph.add("Add", down, residual), OUT, [BATCH, TOKENS, width])
    return graph.model()


def llama_head(settings: LlamaSettings, num_labels: int) -> onnx.ModelProto:
    """Classify by the normed last real token of each text."""
    graph = GraphWriter("llama_head")
    width = settings.hidden_size
    hidden = hidden_input(graph, TOKENS, width)
    last = graph.input(LAST, [BATCH], TensorProto.INT64)
    is_last = graph.add(
        "Equal", graph.add("Unsqueeze", last, graph.ints(1, 2)), _positions(graph, hidden)
    )
    chosen = graph.add("MatMul", _as_float(graph, is_last), hidden)
    states = _rms_norm(graph, graph.add("Squeeze", chosen, graph.ints(1)), "norm", settings)
    logits = linear(graph, states, "score", (num_labels, width), bias=False)
    graph.output(logits, LOGITS, [BATCH, num_labels])
    return graph.model()


def _attention(graph: GraphWriter, states: str, settings: LlamaSettings) -> str:
    """Attend to earlier tokens; axes are (example, key head, query head of it, token, feature)."""
    width, head_dim = settings.hidden_size, settings.head_dim
    heads, groups = settings.num_attention_heads, settings.num_key_value_heads
    bias, half = settings.attention_bias, head_dim // 2
    cosine, sine = (graph.input(name, [TOKENS, half]) for name in (COSINE, SINE))

    def project(name: str, queries: int) -> str:
        features = groups * queries * head_dim
        projected = linear(graph, states, f"self_attn.{name}", (features, width), bias=bias)
        split = graph.add("Reshape", projected, graph.ints(0, 0, groups, queries, head_dim))
        return graph.add("Transpose", split, perm=[0, 2, 3, 1, 4])

    query = _rotated(graph, project("q_proj", heads // groups), cosine, sine)
    key = _rotated(graph, project("k_proj", 1), cosine, sine)
    query = graph.add("Mul", query, graph.floats(head_dim**-0.5))
    scores = graph.add("MatMul", query, graph.add("Transpose", key, perm=[0, 1, 2, 4, 3]))
    masked = graph.add("Add", scores, graph.input(MASK, [TOKENS, TOKENS]))
    weights = graph.add("Softmax", masked, axis=-1)
    mixed = graph.add("MatMul", weights, project("v_proj", 1))
    rows = graph.add("Transpose", mixed, perm=[0, 3, 1, 2, 4])
    joined = graph.add("Reshape", rows, graph.ints(0, 0, heads * head_dim))
    return linear(graph, joined, "self_attn.o_proj", (width, heads * head_dim), bias=bias)


def _rotated(graph: GraphWriter, states: str, cosine: str, sine: str) -> str:
    """Turn the pairs made of each half's features (arXiv 2104.09864, equation 34)."""
    first, second = graph.add_many("Split", states, count=2, axis=-1, num_outputs=2)
    turned = (
        graph.add("Sub", graph.add("Mul", first, cosine), graph.add("Mul", second, sine)),
        graph.add("Add", graph.add("Mul", second, cosine), graph.add("Mul", first, sine)),
    )
    return graph.add("Concat", *turned, axis=-1)


def _rms_norm(graph: GraphWriter, states: str, name: str, settings: LlamaSettings) -> str:
    """Divide by the root mean square of the features (arXiv 1910.07467, equation 4)."""
    square = graph.add("Mul", states, states)
    mean = graph.add("ReduceMean", square, graph.ints(-1), keepdims=1)
    size = graph.add("Sqrt", graph.add("Add", mean, graph.floats(settings.rms_norm_eps)))
    weight = graph.input(f"{name}.weight", [settings.hidden_size])
    return graph.add("Mul", graph.add("Div", states, size), weight)


def _positions(graph: GraphWriter, states: str) -> str:
    """Count the tokens of (examples, tokens, ...) from 0."""
    size = graph.add("Squeeze", graph.add("Shape", states, start=1, end=2))
    return graph.add("Range", graph.index(0), size, graph.index(1))


def _as_float(graph: GraphWriter, values: str) -> str:
    return graph.add("Cast", values, to=TensorProto.FLOAT)


def _frequencies(settings: LlamaSettings) -> list[float]:
    """Give each pair's angle per position, rounded as PyTorch does."""
    exponents = np.arange(0, settings.head_dim, 2, dtype=np.float32) / settings.head_dim
    theta = np.float32(settings.rope_parameters.rope_theta)
    frequencies: list[float] = (1 / theta**exponents).tolist()
    return frequencies
