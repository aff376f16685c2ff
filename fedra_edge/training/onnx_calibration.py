"""A block of a model on ONNX Runtime with random weights, to be measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedra_edge.protocol.graphs import GRADIENT, HIDDEN, INPUTS, LORA_SCALE, OUT
from fedra_edge.protocol.models import AdapterSpec, ModelSpec, TokenInput
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.calibrating import SPREAD
from fedra_edge.training.onnx_pieces import weight_names
from fedra_edge.training.onnx_sessions import Arrays, Graph, Graphs
from fedra_edge.training.trainer import InputArray

_SHORTEST_S: Final = 1e-6
"""What a backward pass is said to take at least; noise may make it look shorter than none."""


class OnnxBlockProbe:
    """Implements ``BlockProbe``; nothing is kept between forward and backward."""

    def __init__(self, spec: ModelSpec, graphs: Graphs) -> None:
        self._spec = spec
        self._graphs = graphs
        self._generator = np.random.default_rng(0)
        adapter = AdapterSpec(targets=spec.default_targets)
        block = graphs["block"]
        self._weights: dict[str, NDArray[Any]] = {
            name: self._spread(shape)
            for name, shape in _shapes(block, graphs, adapter.rank).items()
        }
        self._weights[LORA_SCALE] = np.asarray(adapter.scale, dtype=np.float32)

    def time_once(self, examples: int) -> tuple[float, float]:
        """Give the seconds of a forward pass, and by how much the vjp takes longer."""
        hidden, context = self._entering(examples)
        gradient = self._random(hidden)
        started = time.perf_counter()
        self._forward(hidden, context)
        middle = time.perf_counter()
        self._pull(hidden, context, gradient)
        forward_s = middle - started
        return forward_s, max(_SHORTEST_S, time.perf_counter() - middle - forward_s)

    def prepare(self, examples: int) -> Callable[[], object]:
        """Draw what enters and the gradient, and give what runs forward and backward on it."""
        hidden, context = self._entering(examples)
        gradient = self._random(hidden)

        def run() -> None:
            self._forward(hidden, context)
            self._pull(hidden, context, gradient)

        return run

    def kept_bytes(self, examples: int, *, are_trained: bool) -> int:
        """Weigh nothing: the vjp computes once more what it needs."""
        del examples, are_trained
        return 0

    def _forward(self, hidden: FloatArray, context: Arrays) -> None:
        self._graphs["block"].run([OUT], self._weights, {HIDDEN: hidden}, context)

    def _pull(self, hidden: FloatArray, context: Arrays, gradient: FloatArray) -> None:
        pulled = self._graphs["block_vjp"]
        given = {HIDDEN: hidden, GRADIENT: gradient}
        pulled.run(pulled.outputs, self._weights, given, context)

    def _entering(self, examples: int) -> tuple[FloatArray, Arrays]:
        """Draw activations of the largest shape there is, with the context of such a batch."""
        stem = self._graphs["stem"]
        zeros = {
            name: np.zeros(shape, dtype=np.float32)
            for name, shape in _shapes(stem, self._graphs, rank=1).items()
        }
        outputs = stem.run(stem.outputs, zeros, {INPUTS: _zeros(self._spec, examples)})
        return self._random(outputs.pop(HIDDEN)), outputs

    def _spread(self, shape: list[int]) -> FloatArray:
        """Draw weights, without a second array of their size on the way."""
        values: FloatArray = self._generator.random(shape, dtype=np.float32)
        values -= 0.5
        values *= 2 * SPREAD
        return values

    def _random(self, like: FloatArray) -> FloatArray:
        return self._generator.standard_normal(like.shape, dtype=np.float32)


def _shapes(graph: Graph, graphs: Graphs, rank: int) -> dict[str, list[int]]:
    """Give the shape of every weight; the one size that a call decides is the rank."""
    return {
        name: [size if isinstance(size, int) else rank for size in graph.inputs[name]]
        for name in sorted(weight_names(graph, graphs))
    }


def _zeros(spec: ModelSpec, examples: int) -> InputArray:
    wanted = spec.input
    if isinstance(wanted, TokenInput):
        return np.zeros((examples, wanted.max_tokens), dtype=np.int64)
    size = (examples, wanted.channels, wanted.size_px, wanted.size_px)
    return np.zeros(size, dtype=np.float32)
