"""Evaluates a whole model layer by layer, with one block's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.errors import TrainingInterrupted
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.training.torch_blocks import (
    build_block,
    build_head,
    build_stem,
    fill_block,
    fill_head,
    fill_stem,
    read_piece,
)
from fedra_edge.training.trainer import EvaluationCounts, ShouldStop, WholeModel

_BOUNDARY_BUDGET_BYTES: Final = 32 * 2**20
"""What the activations between two layers may take, for all examples of a chunk together."""

_MICRO_BATCH_BUDGET_BYTES: Final = 4 * 2**20
"""The same for the examples that go through a block at once; a block needs a multiple of it."""


@torch.no_grad()
def evaluate_blockwise(
    model: WholeModel, data: MatchedDataset, should_stop: ShouldStop, device: torch.device
) -> EvaluationCounts:
    """Count right answers on the held-out examples, forward only.

    Examples go in chunks through layer 0, then through layer 1, and so on, so that each block is
    loaded once per chunk.

    Raises:
        TrainingInterrupted: ``should_stop`` said so.
        SliceError: The pieces do not fit the model.
    """
    num_correct, loss_sum = 0, 0.0
    boundary_bytes = max(1, model.spec.layers[0].cost.boundary_bytes)
    for chunk in _parts(data.held_out_indices, _BOUNDARY_BUDGET_BYTES // boundary_bytes):
        micro_batches = _parts(chunk, _MICRO_BATCH_BUDGET_BYTES // boundary_bytes)
        walk = _Walk(model, device, should_stop)
        labels = walk.enter(data, micro_batches)
        walk.pass_layers()
        for logits, label_ids in zip(walk.leave(), labels, strict=True):
            num_correct += int((logits.argmax(dim=1) == label_ids).sum())
            loss_sum += F.cross_entropy(logits.double(), label_ids, reduction="sum").item()
    return EvaluationCounts(len(data.held_out_indices), num_correct, loss_sum)


class _Walk:
    """A chunk's activations on their way from the stem to the head."""

    def __init__(self, model: WholeModel, device: torch.device, should_stop: ShouldStop) -> None:
        self._model = model
        self._device = device
        self._should_stop = should_stop
        self._hidden: list[Tensor] = []

    def enter(self, data: MatchedDataset, micro_batches: Sequence[Sequence[int]]) -> list[Tensor]:
        """Send the examples through the stem and give their labels."""
        spec = self._model.spec
        stem = build_stem(spec)
        fill_stem(stem, self._weights(STEM))
        labels = []
        for indices in micro_batches:
            self._stop_if_asked()
            images, label_ids = data.batch(indices, spec.input)
            self._hidden.append(stem(torch.from_numpy(images).to(self._device)))
            labels.append(torch.from_numpy(label_ids).to(self._device))
        return labels

    def pass_layers(self) -> None:
        """Send the activations through every layer, one layer at a time."""
        spec: ModelSpec = self._model.spec
        block = build_block(spec, self._model.adapter)
        for layer_id in spec.layer_ids:
            weights = self._weights(layer_piece(layer_id))
            fill_block(block, weights, self._model.adapters, layer_id, self._device)
            for index, hidden in enumerate(self._hidden):
                self._stop_if_asked()
                self._hidden[index] = block(hidden)

    def leave(self) -> Iterator[Tensor]:
        """Yield the logits of each micro-batch."""
        head = build_head(self._model.spec)
        fill_head(head, self._weights(HEAD), self._model.adapters, self._device)
        for hidden in self._hidden:
            yield head(hidden)

    def _weights(self, piece: str) -> dict[str, Tensor]:
        return read_piece(self._model.weights[piece], self._device)

    def _stop_if_asked(self) -> None:
        if self._should_stop():
            raise TrainingInterrupted("stopped while evaluating")


def _parts(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    step = max(1, size)
    return [indices[start : start + step] for start in range(0, len(indices), step)]
