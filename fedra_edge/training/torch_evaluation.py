"""Sends examples through a whole model, forward, with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.data.tokenizing import padded
from fedra_edge.errors import MemoryShortError, SliceError, TrainingInterrupted
from fedra_edge.memory_meter import resident_bytes
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_edge.protocol.models import ModelSpec, Piece
from fedra_edge.protocol.tensors import FloatArray, map_tensor
from fedra_edge.training.torch_blocks import (
    build_block,
    build_head,
    build_stem,
    fill_block,
    fill_head,
    fill_stem,
    find_context,
    read_piece,
)
from fedra_edge.training.torch_pieces import Context
from fedra_edge.training.torch_training import is_memory_shortage
from fedra_edge.training.trainer import (
    EvaluationCounts,
    InputArray,
    ShouldStop,
    UsableMemory,
    WholeModel,
)

_MOST_WALKING_BYTES: Final = 32 * 2**20
"""What the activations between two layers take at most, for all examples of a chunk together."""

_MOST_WORKING_BYTES: Final = 64 * 2**20
"""What those inside a block take at most; more examples at once would not make it faster."""

_Chunk = list[tuple[Tensor, Context]]


class ForwardWalk:
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
        model: WholeModel,
        should_stop: ShouldStop,
        usable_memory: UsableMemory,
        device: torch.device,
    ) -> None:
        self._model = model
        self._should_stop = should_stop
        self._usable_memory = usable_memory
        self._device = device

    def count(self, data: MatchedDataset) -> EvaluationCounts:
        """Count right answers on the held-out examples."""
        indices = data.held_out_indices
        inputs = (data.batch([index], self._model.spec.input)[0][0] for index in indices)
        labels = torch.tensor([data.label_ids[index] for index in indices])
        num_correct, loss_sum, done = 0, 0.0, 0
        for logits in self._logits(inputs):
            label_ids = labels[done : done + len(logits)]
            num_correct += int((logits.argmax(dim=1) == label_ids).sum())
            loss_sum += F.cross_entropy(logits.double(), label_ids, reduction="sum").item()
            done += len(logits)
        return EvaluationCounts(done, num_correct, loss_sum)

    def probabilities(self, inputs: Iterable[InputArray]) -> Iterator[FloatArray]:
        """Yield every label's probability for each input, in order."""
        for logits in self._logits(inputs):
            yield from logits.double().softmax(dim=1).float().numpy()

    def _logits(self, inputs: Iterable[InputArray]) -> Iterator[Tensor]:
        """Yield the logits of one micro-batch after the other, on the CPU."""
        remaining = iter(inputs)
        while True:
            free_bytes = self._usable_memory() - resident_bytes()
            micro_batch, walk_batch = forward_batches(self._model.spec, free_bytes)
            try:
                chunk = self._enter(islice(remaining, walk_batch), micro_batch)
                if not chunk:
                    return
                self._pass_layers(chunk)
                logits = self._leave(chunk)
            except (MemoryError, RuntimeError, OSError) as error:
                if not is_memory_shortage(error):
                    raise
                raise MemoryShortError(
                    f"memory ran out with {micro_batch} examples at once",
                    remedy="Free memory on this machine, or raise the limit it runs under.",
                ) from error
            yield from logits

    @torch.no_grad()
    def _enter(self, inputs: Iterator[InputArray], micro_batch: int) -> _Chunk:
        """Send a chunk through the stem, and find what its micro-batches need on their way."""
        spec = self._model.spec
        stem = build_stem(spec)
        fill_stem(stem, self._weights(STEM))
        chunk = []
        while together := list(islice(inputs, micro_batch)):
            self._stop_if_asked()
            batch = _stacked(together).to(self._device)
            chunk.append((stem(batch), find_context(spec, batch)))
        return chunk

    @torch.no_grad()
    def _pass_layers(self, chunk: _Chunk) -> None:
        """Send all micro-batches through every layer, in place of what entered it."""
        spec = self._model.spec
        block = build_block(spec, self._model.adapter)
        for layer_id in spec.layer_ids:
            weights = self._weights(layer_piece(layer_id))
            fill_block(block, weights, self._model.adapters, layer_id)
            for index, (hidden, context) in enumerate(chunk):
                self._stop_if_asked()
                chunk[index] = (block(hidden, *context), context)

    @torch.no_grad()
    def _leave(self, chunk: _Chunk) -> list[Tensor]:
        head = build_head(self._model.spec)
        fill_head(head, self._weights(HEAD), self._model.adapters)
        return [head(hidden, *context).cpu() for hidden, context in chunk]

    def _weights(self, piece: str) -> dict[str, Tensor]:
        held = self._model.weights[piece]
        if held.tensors is None:
            return read_piece(held.path, self._device)
        try:
            return {
                name: torch.from_numpy(map_tensor(held.path, info)).to(self._device)
                for name, info in held.tensors.items()
            }
        except ValueError as error:
            raise SliceError(f"the weights of {piece} cannot be read: {error}") from error

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


def _stacked(inputs: list[InputArray]) -> Tensor:
    """Make one batch of examples; texts are padded to the longest of them."""
    if inputs[0].ndim > 1:
        return torch.from_numpy(np.stack(inputs))
    return torch.from_numpy(padded(inputs))
