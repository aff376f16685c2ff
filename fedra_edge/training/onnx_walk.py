"""A slice on ONNX Runtime: a walk over its pieces with one block's weights in memory at a time.

Forward keeps only what enters each layer from the lowest trained one up; backward feeds that to
the graph of the block's vjp, layer by layer from the last, which recomputes what it needs. All
micro-batches go through one block before the next is read.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from fedra_edge.errors import SliceError
from fedra_edge.protocol.graphs import GRADIENT, GRADIENT_SUFFIX, HIDDEN, INPUTS, LOGITS, OUT
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, STEM, TensorKey, layer_piece
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.cross_entropy import cross_entropy_pull
from fedra_edge.training.engine import LabelIds
from fedra_edge.training.onnx_pieces import PieceFeeds
from fedra_edge.training.onnx_sessions import Arrays, Graphs
from fedra_edge.training.trainer import InputArray, PieceFile, SliceWork


@dataclass(frozen=True)
class Entering:
    """A micro-batch on its way: what enters a layer, and what of it all layers and the head need.

    ``hidden`` is of shape (examples, tokens, width).
    """

    hidden: FloatArray
    context: Arrays


class OnnxSlice:
    """A slice whose frozen weights stay in their files; gradients add up in ``gradients``.

    Args:
        work: The slice's files and adapters.
        graphs: The computations of its pieces.
        trained: The trained values by global name, which stand in for the received ones.
    """

    def __init__(self, work: SliceWork, graphs: Graphs, trained: Mapping[str, FloatArray]) -> None:
        self.gradients: dict[str, FloatArray] = {}
        self._graphs = graphs
        self._trained = trained
        files = {piece: PieceFile(path) for piece, path in work.weights.items()}
        adapters = ChainMap(dict(trained), dict(work.adapters))
        self._pieces = PieceFeeds(graphs, files, adapters, work.manifest.adapter.scale)
        self._head = self._pieces.read(HEAD)
        layer_ids = work.manifest.layer_ids
        first_trained = layer_ids.index(work.manifest.trained_layer_ids[0])
        self._prefix, self._suffix = layer_ids[:first_trained], layer_ids[first_trained:]

    def enter(self, inputs: Iterable[InputArray]) -> list[Entering]:
        """Bring micro-batches to the lowest trained layer, all through one block at a time."""
        self._pieces.prefetch(layer_piece((*self._prefix, *self._suffix)[0]))
        hidden, contexts = self._through_stem(inputs)
        for layer_id, following in pairwise((*self._prefix, self._suffix[0])):
            self._pass(layer_id, following, hidden, contexts)
        return [Entering(*pair) for pair in zip(hidden, contexts, strict=True)]

    def accumulate(
        self, entering: Sequence[Entering], labels: Sequence[LabelIds], num_examples: int
    ) -> float:
        """Add the gradient of the mean loss, all micro-batches layer by layer."""
        contexts = [batch.context for batch in entering]
        kept = self._forward([batch.hidden for batch in entering], contexts)
        loss, gradients = self._turn(kept.pop(), contexts, labels, num_examples)
        self._backward(kept, contexts, gradients)
        return loss

    def _through_stem(self, inputs: Iterable[InputArray]) -> tuple[list[FloatArray], list[Arrays]]:
        stem = self._graphs["stem"]
        weights = self._pieces.read(STEM)
        hidden: list[FloatArray] = []
        contexts: list[Arrays] = []
        for batch in inputs:
            outputs = stem.run(stem.outputs, weights, {INPUTS: batch})
            hidden.append(outputs.pop(HIDDEN))
            contexts.append(outputs)
        return hidden, contexts

    def _forward(
        self, hidden: list[FloatArray], contexts: Sequence[Arrays]
    ) -> list[list[FloatArray]]:
        """Give, per layer from the lowest trained one up, what enters it."""
        kept = []
        for layer_id, following in pairwise(self._suffix):
            kept.append(list(hidden))
            self._pass(layer_id, following, hidden, contexts)
        return [*kept, hidden]

    def _pass(
        self,
        layer_id: LayerId,
        following: LayerId,
        hidden: list[FloatArray],
        contexts: Sequence[Arrays],
    ) -> None:
        """Send every micro-batch through a layer, in place of what entered it."""
        weights = self._read(layer_id, following)
        for index, context in enumerate(contexts):
            hidden[index] = self._through(weights, hidden[index], context)

    def _turn(
        self,
        entering: list[FloatArray],
        contexts: Sequence[Arrays],
        labels: Sequence[LabelIds],
        num_examples: int,
    ) -> tuple[float, list[FloatArray]]:
        """Go through the last layer and the head and straight back."""
        below = self._suffix[:-1]
        weights = self._read(self._suffix[-1], below[-1] if below else None)
        total, gradients = 0.0, []
        for index, (context, label_ids) in enumerate(zip(contexts, labels, strict=True)):
            out = self._through(weights, entering[index], context)
            loss, gradient = self._leave(out, context, label_ids, num_examples)
            del out
            batch = Entering(entering[index], context)
            gradients.append(self._pull(self._suffix[-1], weights, batch, gradient))
            total += loss
        return total, gradients

    def _leave(
        self, out: FloatArray, context: Arrays, label_ids: LabelIds, num_examples: int
    ) -> tuple[float, FloatArray]:
        """Give the loss and its gradient by what leaves the last layer."""
        given = {HIDDEN: out}
        logits = self._graphs["head"].run([LOGITS], self._head, given, context)[LOGITS]
        loss, gradient = cross_entropy_pull(logits, label_ids, num_examples)
        pulled = self._graphs["head_vjp"]
        found = pulled.run(pulled.outputs, self._head, given, {GRADIENT: gradient}, context)
        below: FloatArray = found.pop(HIDDEN + GRADIENT_SUFFIX)
        self._add(HEAD, found)
        return loss, below

    def _backward(
        self,
        kept: list[list[FloatArray]],
        contexts: Sequence[Arrays],
        gradients: list[FloatArray],
    ) -> None:
        """Pull the gradients down to the lowest trained layer, which needs none below it."""
        descending = self._suffix[-2::-1]
        for layer_id, following in zip_longest(descending, descending[1:]):
            weights = self._read(layer_id, following)
            entering = kept.pop()
            for index, context in enumerate(contexts):
                batch = Entering(entering[index], context)
                gradients[index] = self._pull(layer_id, weights, batch, gradients[index])
            del weights

    def _through(self, weights: Arrays, hidden: FloatArray, context: Arrays) -> FloatArray:
        computed = self._graphs["block"].run([OUT], weights, {HIDDEN: hidden}, context)
        out: FloatArray = computed[OUT]
        return out

    def _pull(
        self, layer_id: LayerId, weights: Arrays, batch: Entering, gradient: FloatArray
    ) -> FloatArray:
        """Add the gradients of a layer's adapters, and give that of what entered it.

        Frozen layers need none of the former, the lowest one not the latter: its gradient is
        given back as it came.
        """
        below = HIDDEN + GRADIENT_SUFFIX
        piece = layer_piece(layer_id)
        wanted = [
            name
            for name in self._graphs["block_vjp"].outputs
            if (layer_id != self._suffix[0] if name == below else self._is_trained(piece, name))
        ]
        given = {HIDDEN: batch.hidden, GRADIENT: gradient}
        found = self._graphs["block_vjp"].run(wanted, weights, given, batch.context)
        pulled: FloatArray = found.pop(below, gradient)
        self._add(piece, found)
        return pulled

    def _is_trained(self, piece: str, output: str) -> bool:
        return _global_name(piece, output) in self._trained

    def _add(self, piece: str, found: Mapping[str, FloatArray]) -> None:
        for output, gradient in found.items():
            name = _global_name(piece, output)
            if gradient.shape != self._trained[name].shape:
                raise SliceError(f"the gradient of {name} has the shape {gradient.shape}")
            if name in self.gradients:
                self.gradients[name] += gradient
            else:
                self.gradients[name] = gradient

    def _read(self, layer_id: LayerId, following: LayerId | None) -> Arrays:
        if following is not None:
            self._pieces.prefetch(layer_piece(following))
        return self._pieces.read(layer_piece(layer_id))


def _global_name(piece: str, output: str) -> str:
    return str(TensorKey(piece, output.removesuffix(GRADIENT_SUFFIX)))
