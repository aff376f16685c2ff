"""The walk: a training step over a slice with one block's weights in memory at a time.

Forward keeps only what enters each layer from the lowest trained one up; backward goes through
the layers once more from the last, recomputes each block and pulls the gradient through it. So
the gradient is that of ordinary autograd over the same slice (Chen et al., arXiv 1604.06174,
section 3, with one segment per layer), and weights are read from their files twice per step.

Micro-batches go layer by layer, all of them through one block before the next is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, STEM, TensorKey, layer_piece
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.torch_blocks import (
    block_state,
    build_block,
    build_head,
    build_stem,
    fill_head,
    fill_stem,
    read_piece,
)
from fedra_edge.training.trainer import SliceWork


class StreamedSlice:
    """A slice whose frozen weights stay in their files; only trained tensors live in memory."""

    def __init__(self, work: SliceWork, device: torch.device) -> None:
        self._work = work
        self._device = device
        self._weights: Mapping[str, Path] = work.weights
        self._layer_ids = work.manifest.layer_ids
        self._block = build_block(work.spec, work.manifest.adapter)
        self._stem = build_stem(work.spec)
        self._head = build_head(work.spec)
        fill_head(self._head, self._read(HEAD), work.adapters, device)
        self.trained: dict[str, nn.Parameter] = {}
        self._adapters = self._live_adapters()
        self._mark_head()
        self._first_trained = self._layer_ids.index(min(work.manifest.trained_layer_ids))

    def accumulate(
        self, images: Sequence[Tensor], labels: Sequence[Tensor], num_examples: int
    ) -> float:
        """Add the gradient of the mean loss, all micro-batches layer by layer."""
        kept = self._forward(images)
        loss, gradients = self._turn(kept.pop(), labels, num_examples)
        self._backward(kept, gradients)
        return loss

    def trained_values(self) -> dict[str, FloatArray]:
        """Copy the trained tensors out, by global name."""
        return {
            name: parameter.detach().cpu().numpy().copy()
            for name, parameter in self.trained.items()
        }

    @torch.no_grad()
    def _forward(self, images: Sequence[Tensor]) -> list[list[Tensor]]:
        """Give, per layer from the lowest trained one up, what enters it."""
        fill_stem(self._stem, self._read(STEM))
        hidden = [self._stem(image.to(self._device)) for image in images]
        kept: list[list[Tensor]] = []
        for position, layer_id in enumerate(self._layer_ids[:-1]):
            if position >= self._first_trained:
                kept.append(list(hidden))
            state = self._state(layer_id)
            for index, entering in enumerate(hidden):
                hidden[index] = functional_call(self._block, state, (entering,))
        kept.append(hidden)
        return kept

    def _turn(
        self, entering: list[Tensor], labels: Sequence[Tensor], num_examples: int
    ) -> tuple[float, list[Tensor]]:
        """Go through the last layer and the head and straight back, without a recomputation."""
        state = self._state(self._layer_ids[-1])
        total, gradients = 0.0, []
        is_needed_below = self._first_trained < len(self._layer_ids) - 1
        for hidden, label_ids in zip(entering, labels, strict=True):
            hidden.requires_grad_(is_needed_below)
            logits = self._head(functional_call(self._block, state, (hidden,)))
            targets = label_ids.to(self._device)
            loss = F.cross_entropy(logits, targets, reduction="sum") / num_examples
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            total += loss.item()
            if is_needed_below:
                gradients.append(_taken(hidden))
        return total, gradients

    def _backward(self, kept: list[list[Tensor]], gradients: list[Tensor]) -> None:
        """Pull the gradients down to the lowest trained layer, which needs none below it."""
        for layer_id in reversed(self._layer_ids[self._first_trained : -1]):
            state = self._state(layer_id)
            entering = kept.pop()
            for index, hidden in enumerate(entering):
                hidden.requires_grad_(bool(kept))
                output = functional_call(self._block, state, (hidden,))
                _pull(output, gradients[index])
                if kept:
                    gradients[index] = _taken(hidden)

    def _live_adapters(self) -> dict[LayerId, dict[str, Tensor]]:
        """Put the adapters of every layer of the slice into memory, trained ones as parameters."""
        manifest = self._work.manifest
        live: dict[LayerId, dict[str, Tensor]] = {}
        for layer_id in manifest.layer_ids:
            held = live[layer_id] = {}
            for name in self._work.spec.layer_adapter_shapes(manifest.adapter, layer_id):
                held[name] = torch.tensor(self._work.adapters[name], device=self._device)
                if layer_id in manifest.trained_layer_ids:
                    held[name] = self.trained[name] = nn.Parameter(held[name])
        return live

    def _mark_head(self) -> None:
        for name in self._work.spec.head_shapes():
            parameter = self._head.get_parameter(TensorKey.parse(name).name)
            parameter.requires_grad = True
            self.trained[name] = parameter

    def _state(self, layer_id: LayerId) -> dict[str, Tensor]:
        """Give a layer's weights, still in their file, and its adapters."""
        weights = self._read(layer_piece(layer_id))
        return block_state(self._block, weights, self._adapters[layer_id], layer_id)

    def _read(self, piece: str) -> dict[str, Tensor]:
        return read_piece(self._weights[piece], self._device)


def _pull(output: Tensor, gradient: Tensor) -> None:
    """Pull a gradient back through what made the output.

    ``Tensor.backward(gradient)`` would do, but imports PyTorch's symbolic shapes, some 40 MB.
    """
    torch.sum(output * gradient).backward()  # type: ignore[no-untyped-call]  # unannotated


def _taken(hidden: Tensor) -> Tensor:
    """Take the gradient out of a boundary activation and let go of the activation."""
    gradient = hidden.grad
    if gradient is None:
        raise RuntimeError("no gradient reached a boundary activation")
    hidden.grad = None
    return gradient
