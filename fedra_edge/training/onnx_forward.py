"""A whole model on ONNX Runtime, forward only, one piece after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedra_edge.protocol.graphs import HIDDEN, INPUTS, LOGITS, OUT
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.onnx_pieces import PieceFeeds
from fedra_edge.training.onnx_sessions import Graphs
from fedra_edge.training.onnx_walk import Entering
from fedra_edge.training.trainer import InputArray, WholeModel


class OnnxForward:
    """Implements ``ForwardEngine``."""

    def __init__(self, model: WholeModel, graphs: Graphs) -> None:
        self._layer_ids = model.spec.layer_ids
        self._graphs = graphs
        self._pieces = PieceFeeds(graphs, model.weights, model.adapters, model.adapter.scale)

    def stem(self) -> Callable[[InputArray], Entering]:
        """Load the stem."""
        stem, weights = self._graphs["stem"], self._pieces.read(STEM)

        def enter(inputs: InputArray) -> Entering:
            outputs = stem.run(stem.outputs, weights, {INPUTS: inputs})
            return Entering(outputs.pop(HIDDEN), outputs)

        return enter

    def layers(self) -> Iterator[Callable[[Entering], Entering]]:
        """Load one layer after the other."""
        for layer_id in self._layer_ids:
            yield self._layer(layer_piece(layer_id))

    def head(self) -> Callable[[Entering], FloatArray]:
        """Load the head."""
        head, weights = self._graphs["head"], self._pieces.read(HEAD)

        def leave(moving: Entering) -> FloatArray:
            given = {HIDDEN: moving.hidden}
            logits: FloatArray = head.run([LOGITS], weights, given, moving.context)[LOGITS]
            return logits

        return leave

    def _layer(self, piece: str) -> Callable[[Entering], Entering]:
        block, weights = self._graphs["block"], self._pieces.read(piece)

        def pass_on(moving: Entering) -> Entering:
            computed = block.run([OUT], weights, {HIDDEN: moving.hidden}, moving.context)
            return Entering(computed[OUT], moving.context)

        return pass_on
