"""Sends examples through a whole model, forward, with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, Generic

import numpy as np

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.data.tokenizing import padded
from fedra_edge.errors import MORE_MEMORY, MemoryShortError, TrainingInterrupted
from fedra_edge.memory_meter import resident_bytes, unshared_bytes
from fedra_edge.protocol.models import ModelSpec, Piece
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.cross_entropy import cross_entropy_sum, log_softmax
from fedra_edge.training.engine import ForwardEngine, Moving
from fedra_edge.training.memory_shortage import is_memory_shortage
from fedra_edge.training.trainer import EvaluationCounts, InputArray, ShouldStop, UsableMemory

_MEGABYTE: Final = 10**6
_MOST_WALKING_BYTES: Final = 32 * 2**20
"""What the activations between two layers take at most, for all examples of a chunk together."""

_MOST_WORKING_BYTES: Final = 64 * 2**20
"""What those inside a block take at most; more examples at once would not make it faster."""


class ForwardWalk(Generic[Moving]):
    """Examples on their way from stem to head.

    They go in chunks through layer 0, then through layer 1, and so on, so that each block is
    loaded once per chunk. Whatever comes out is computed while it is asked for.

    Raises:
        TrainingInterrupted: ``should_stop`` said so.
        SliceError: The pieces do not fit the model.
        MemoryShortError: Memory does not even suffice for one example.
    """

    def __init__(
        self,
        engine: ForwardEngine[Moving],
        spec: ModelSpec,
        should_stop: ShouldStop,
        usable_memory: UsableMemory,
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._should_stop = should_stop
        self._usable_memory = usable_memory

    def count(self, data: MatchedDataset) -> EvaluationCounts:
        """Count right answers on the held-out examples."""
        indices = data.held_out_indices
        inputs = (data.batch([index], self._spec.input)[0][0] for index in indices)
        labels = data.labels_of(np.asarray(indices, dtype=np.int64))
        num_correct, loss_sum, done = 0, 0.0, 0
        for logits in self._logits(inputs):
            label_ids = labels[done : done + len(logits)]
            num_correct += int((logits.argmax(axis=1) == label_ids).sum())
            loss_sum += cross_entropy_sum(logits.astype(np.float64), label_ids)
            done += len(logits)
        return EvaluationCounts(done, num_correct, loss_sum)

    def probabilities(self, inputs: Iterable[InputArray]) -> Iterator[FloatArray]:
        """Yield every label's probability for each input, in order."""
        for logits in self._logits(inputs):
            yield from np.exp(log_softmax(logits.astype(np.float64))).astype(np.float32)

    def _logits(self, inputs: Iterable[InputArray]) -> Iterator[FloatArray]:
        """Yield the logits of one micro-batch after the other."""
        remaining = iter(inputs)
        while True:
            free_bytes = self._free_bytes()
            micro_batch, walk_batch = forward_batches(self._spec, free_bytes)
            try:
                chunk = self._enter(islice(remaining, walk_batch), micro_batch)
                if not chunk:
                    return
                self._pass_layers(chunk)
                head = self._engine.head()
                logits = [head(moving) for moving in chunk]
            except (MemoryError, RuntimeError, OSError) as error:
                if not is_memory_shortage(error):
                    raise
                raise MemoryShortError(
                    f"memory ran out with {micro_batch} examples at once",
                    remedy=MORE_MEMORY,
                ) from error
            del head
            yield from logits

    def _free_bytes(self) -> int:
        usable_bytes, own_bytes = self._usable_memory(), unshared_bytes()
        if usable_bytes < own_bytes:
            raise MemoryShortError(
                f"this process may use {usable_bytes / _MEGABYTE:.0f} MB, and needs "
                f"{own_bytes / _MEGABYTE:.0f} MB for itself alone",
                remedy=MORE_MEMORY,
            )
        return usable_bytes - resident_bytes()

    def _enter(self, inputs: Iterator[InputArray], micro_batch: int) -> list[Moving]:
        """Send a chunk through the stem."""
        stem = self._engine.stem()
        chunk = []
        while together := list(islice(inputs, micro_batch)):
            self._stop_if_asked()
            chunk.append(stem(_stacked(together)))
        return chunk

    def _pass_layers(self, chunk: list[Moving]) -> None:
        """Send all micro-batches through every layer, in place of what entered it."""
        for layer in self._engine.layers():
            for index, moving in enumerate(chunk):
                self._stop_if_asked()
                chunk[index] = layer(moving)

    def _stop_if_asked(self) -> None:
        if self._should_stop():
            raise TrainingInterrupted("stopped on the way through the model")


def forward_batches(spec: ModelSpec, free_bytes: int) -> tuple[int, int]:
    """Give how many examples go through a block at once, and how many through it in all.

    Half of what is free beside one piece's weights may go to the activations inside a block, the
    other half to those between two blocks; one example goes through in any case.
    """
    pieces = (spec.stem, *spec.layers, spec.head)
    weights = max(_weights_bytes(piece) for piece in pieces)
    boundary = max(1, *(piece.cost.boundary_bytes for piece in (spec.stem, *spec.layers)))
    working = 2 * boundary + max(piece.cost.activation_bytes for piece in pieces)
    share_bytes = max(0, free_bytes - weights) // 2
    micro_batch = max(1, min(share_bytes, _MOST_WORKING_BYTES) // working)
    walk_batch = min(share_bytes, _MOST_WALKING_BYTES) // boundary
    return micro_batch, max(micro_batch, walk_batch)


def _weights_bytes(piece: Piece) -> int:
    """Give what a piece's weights take, with those in the file where they have to be widened."""
    is_widened = piece.weights.size_bytes < piece.cost.parameter_bytes
    return piece.cost.parameter_bytes + (piece.weights.size_bytes if is_widened else 0)


def _stacked(inputs: list[InputArray]) -> InputArray:
    """Make one batch of examples; texts are padded to the longest of them."""
    return np.stack(inputs) if inputs[0].ndim > 1 else padded(inputs)
