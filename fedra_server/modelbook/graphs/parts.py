"""Parts of transformer graphs that the model families share."""

from __future__ import annotations

import math
from typing import Final

from onnx import TensorProto

from fedra_edge.protocol.graphs import HIDDEN, INPUTS
from fedra_edge.protocol.vit import Activation
from fedra_server.modelbook.graphs.writing import Dim, GraphWriter

BATCH: Final = "n"
TOKENS: Final = "t"
"""The names of open sizes: examples, and the tokens of a text."""

_TANH_GELU_CUBE: Final = 0.044715


def linear(
    graph: GraphWriter, states: str, name: str, shape: tuple[int, int], *, bias: bool
) -> str:
    """Apply a linear module of (out, in) features; onnxruntime fuses the Transpose."""
    weight = graph.add("Transpose", graph.input(f"{name}.weight", shape), perm=[1, 0])
    product = graph.add("MatMul", states, weight)
    return graph.add("Add", product, graph.input(f"{name}.bias", shape[:1])) if bias else product


def activation(graph: GraphWriter, states: str, kind: Activation) -> str:
    """Apply an activation function, by the names of transformers."""
    match kind:
        case "relu":
            return graph.add("Relu", states)
        case "silu":
            return graph.add("Mul", states, graph.add("Sigmoid", states))
        case "gelu":
            return _gelu(graph, states, _erf_bend(graph, states))
        case "gelu_new" | "gelu_pytorch_tanh":
            return _gelu(graph, states, _tanh_bend(graph, states))


def layer_norm(graph: GraphWriter, states: str, name: str, width: int, eps: float) -> str:
    """Apply a LayerNorm over the features."""
    weight, bias = (graph.input(f"{name}.{part}", [width]) for part in ("weight", "bias"))
    return graph.add("LayerNormalization", states, weight, bias, axis=-1, epsilon=eps)


def hidden_input(graph: GraphWriter, tokens: Dim, width: int) -> str:
    """Declare the activations that enter a layer or the head."""
    return graph.input(HIDDEN, [BATCH, tokens, width])


def token_input(graph: GraphWriter) -> str:
    """Declare a padded batch of texts."""
    return graph.input(INPUTS, [BATCH, TOKENS], TensorProto.INT64)


def _gelu(graph: GraphWriter, states: str, bend: str) -> str:
    """Give x (1 + bend(x)) / 2 (arXiv 1606.08415); onnxruntime knows it by this form."""
    gated = graph.add("Mul", states, graph.add("Add", bend, graph.floats(1.0)))
    return graph.add("Mul", gated, graph.floats(0.5))


def _erf_bend(graph: GraphWriter, states: str) -> str:
    return graph.add("Erf", graph.add("Div", states, graph.floats(math.sqrt(2))))


def _tanh_bend(graph: GraphWriter, states: str) -> str:
    square = graph.add("Mul", states, states)
    cubic = graph.add("Mul", square, graph.floats(_TANH_GELU_CUBE))
    factor = graph.add("Add", cubic, graph.floats(1.0))
    scaled = graph.add("Mul", states, graph.floats(math.sqrt(2 / math.pi)))
    return graph.add("Tanh", graph.add("Mul", scaled, factor))
