"""The walk: a training step over a slice with one block's weights in memory at a time.

Forward keeps only what enters each layer from the lowest trained one up; backward goes through
the layers once more from the last, recomputes of each block what its gradient needs and pulls the
gradient through it. So the gradient is that of ordinary autograd over the same slice (Chen et al.,
arXiv 1604.06174, section 3, with one segment per layer), and weights are read from their files
twice per step.

Micro-batches go layer by layer, all of them through one block before the next is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_edge.training.allocator import trim_heap
from fedra_edge.training.torch_blocks import (
    build_block,
    build_head,
    build_stem,
    fill_block,
    fill_head,
    fill_stem,
    find_context,
    restore,
)
from fedra_edge.training.torch_keeping import kept_apart
from fedra_edge.training.torch_lora import pull_linear
from fedra_edge.training.torch_pieces import Context
from fedra_edge.training.torch_pulling import pull
from fedra_edge.training.torch_reading import PieceReader
from fedra_edge.training.torch_slice import Entering
from fedra_edge.training.trainer import SliceWork


class StreamedSlice:
    """A slice whose frozen weights stay in their files; only trained tensors live in memory.

    Args:
        work: The slice's files and adapters.
        trained: The parameters that gradients go to, as ``trained_parameters`` makes them.
        device: Where it is computed.
        settle: Called when a micro-batch is through a block.

    Raises:
        SliceError: A piece does not fit the model.
    """

    def __init__(
        self,
        work: SliceWork,
        trained: Mapping[str, nn.Parameter],
        device: torch.device,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._settle = settle
        self._work = work
        self._trained = trained
        self._device = device
        self._block = build_block(work.spec, work.manifest.adapter)
        self._unfilled = dict(self._block.named_parameters())
        self._stem = build_stem(work.spec)
        self._head = build_head(work.spec)
        self._pieces = PieceReader(work.weights, device)
        fill_head(self._head, self._pieces.read(HEAD), work.adapters, trained)
        layer_ids = work.manifest.layer_ids
        first_trained = layer_ids.index(work.manifest.trained_layer_ids[0])
        self._prefix, self._suffix = layer_ids[:first_trained], layer_ids[first_trained:]

    @torch.no_grad()
    def enter(self, inputs: Iterable[Tensor]) -> list[Entering]:
        """Bring micro-batches to the lowest trained layer, all through one block at a time."""
        first = layer_piece((*self._prefix, *self._suffix)[0])
        fill_stem(self._stem, self._pieces.read(STEM, first))
        contexts, hidden = [], []
        for batch in inputs:
            on_device = batch.to(self._device)
            contexts.append(find_context(self._work.spec, on_device))
            hidden.append(kept_apart(self._stem(on_device)))
        trim_heap()
        for layer_id, following in pairwise((*self._prefix, self._suffix[0])):
            self._pass(layer_id, following, hidden, contexts)
        return [Entering(*pair) for pair in zip(hidden, contexts, strict=True)]

    def accumulate(
        self, entering: Sequence[Entering], labels: Sequence[Tensor], num_examples: int
    ) -> float:
        """Add the gradient of the mean loss, all micro-batches layer by layer."""
        contexts = [batch.context for batch in entering]
        kept = self._forward([batch.hidden for batch in entering], contexts)
        trim_heap()
        loss, gradients = self._turn(kept.pop(), contexts, labels, num_examples)
        self._backward(kept, contexts, gradients)
        restore(self._block, self._unfilled)
        trim_heap()
        return loss

    @torch.no_grad()
    def _forward(self, hidden: list[Tensor], contexts: Sequence[Context]) -> list[list[Tensor]]:
        """Give, per layer from the lowest trained one up, what enters it."""
        kept = []
        for layer_id, following in pairwise(self._suffix):
            kept.append(list(hidden))
            self._pass(layer_id, following, hidden, contexts)
        return [*kept, hidden]

    def _turn(
        self,
        entering: Sequence[Tensor],
        contexts: Sequence[Context],
        labels: Sequence[Tensor],
        num_examples: int,
    ) -> tuple[float, list[Tensor]]:
        """Go through the last layer and the head and straight back, without a recomputation."""
        below = self._suffix[:-1]
        self._load(self._suffix[-1], below[-1] if below else None)
        total, gradients = 0.0, []
        for start, context, label_ids in zip(entering, contexts, labels, strict=True):
            hidden = start.detach().requires_grad_(bool(below))
            logits = self._head(self._block(hidden, *context), *context)
            targets = label_ids.to(self._device)
            loss = F.cross_entropy(logits, targets, reduction="sum") / num_examples
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            total += loss.item()
            if hidden.grad is not None:
                gradients.append(kept_apart(hidden.grad))
            self._settle()
        return total, gradients

    def _backward(
        self, kept: list[list[Tensor]], contexts: Sequence[Context], gradients: list[Tensor]
    ) -> None:
        """Pull the gradients down to the lowest trained layer, which needs none below it."""
        descending = self._suffix[-2::-1]
        for layer_id, following in zip_longest(descending, descending[1:]):
            self._load(layer_id, following)
            entering = kept.pop()
            for index, context in enumerate(contexts):
                hidden = entering[index].detach().requires_grad_(bool(kept))
                residual, inside = self._block.inner(hidden, *context)
                gradient = gradients[index]
                pulled = pull_linear(self._block.last, inside.detach(), gradient)
                pull((residual, inside), (gradient, pulled))
                if hidden.grad is not None:
                    gradient.copy_(hidden.grad)
                del residual, inside, pulled, hidden
                self._settle()

    def _pass(
        self,
        layer_id: LayerId,
        following: LayerId,
        hidden: list[Tensor],
        contexts: Sequence[Context],
    ) -> None:
        """Send every micro-batch through a layer, in place of what entered it."""
        self._load(layer_id, following)
        for index, context in enumerate(contexts):
            hidden[index] = kept_apart(self._block(hidden[index], *context))
            self._settle()

    def _load(self, layer_id: LayerId, following: LayerId | None) -> None:
        """Put a layer's weights, still in their file, into the block in place of the last ones."""
        following_piece = None if following is None else layer_piece(following)
        restore(self._block, self._unfilled)
        weights = self._pieces.read(layer_piece(layer_id), following_piece)
        fill_block(self._block, weights, self._work.adapters, layer_id, self._trained)
