"""A resident slice: stem, the slice's layers by position, head, as one PyTorch module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedra_edge.protocol.layers import HEAD, STEM, LayerPositions, layer_piece
from fedra_edge.protocol.tensors import FloatArray
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
from fedra_edge.training.torch_keeping import kept_apart
from fedra_edge.training.torch_pieces import Context
from fedra_edge.training.trainer import SliceWork


@dataclass(frozen=True)
class Entering:
    """A micro-batch on its way: what enters the lowest trained layer, and the context.

    ``hidden`` is of shape (examples, tokens, width).
    """

    hidden: Tensor
    context: Context


class TrainableSlice(Protocol):
    """A slice that gradients can be accumulated in, whatever part of it is in memory."""

    def enter(self, inputs: Iterable[Tensor]) -> list[Entering]:
        """Bring micro-batches to the lowest trained layer, which no gradient passes."""
        ...

    def accumulate(
        self, entering: Sequence[Entering], labels: Sequence[Tensor], num_examples: int
    ) -> float:
        """Add the gradient of the mean loss to the trained parameters.

        Args:
            entering: Micro-batches at the lowest trained layer.
            labels: Their label ids, of shape (n_i,).
            num_examples: What the mean is taken over, usually the whole batch.

        Returns:
            The part of the mean loss that these examples make.
        """
        ...


def trained_parameters(work: SliceWork, device: torch.device) -> dict[str, nn.Parameter]:
    """Copy what a slice trains, the head's tensors included, into parameters by global name."""
    manifest = work.manifest
    names = work.spec.delta_shapes(manifest.adapter, manifest.trained_layer_ids)
    return {
        name: nn.Parameter(torch.tensor(work.adapters[name], device=device))
        for name in sorted(names)
    }


def parameter_values(parameters: Mapping[str, nn.Parameter]) -> dict[str, FloatArray]:
    """Copy parameters out, by global name."""
    return {name: value.detach().cpu().numpy().copy() for name, value in parameters.items()}


class ResidentSlice:
    """The layers of a slice in memory, at positions 0, 1, 2 ...; layers not listed are skipped.

    Args:
        work: The slice's files and adapters.
        trained: The parameters that gradients go to, as ``trained_parameters`` makes them.
        device: Where everything lives.
        settle: Called when a micro-batch is through.

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
        spec, manifest = work.spec, work.manifest
        self._spec = spec
        self._device = device
        self.positions = LayerPositions.of(manifest.layer_ids)
        self.stem, self.head = build_stem(spec), build_head(spec)
        fill_stem(self.stem, read_piece(work.weights[STEM], device))
        fill_head(self.head, read_piece(work.weights[HEAD], device), work.adapters, trained)
        self.layers = [build_block(spec, manifest.adapter) for _ in manifest.layer_ids]
        for layer_id, block in zip(manifest.layer_ids, self.layers, strict=True):
            weights = read_piece(work.weights[layer_piece(layer_id)], device)
            fill_block(block, weights, work.adapters, layer_id, trained)
        self._first_trained = self.positions.position_of(manifest.trained_layer_ids[0])

    @torch.no_grad()
    def enter(self, inputs: Iterable[Tensor]) -> list[Entering]:
        """Bring micro-batches to the lowest trained layer; nothing on the way is kept."""
        entering = []
        for batch in inputs:
            on_device = batch.to(self._device)
            context = find_context(self._spec, on_device)
            hidden: Tensor = self.stem(on_device)
            for block in self.layers[: self._first_trained]:
                hidden = block(hidden, *context)
            entering.append(Entering(kept_apart(hidden), context))
            del hidden, batch, on_device
            self._settle()
        return entering

    def leave(self, entering: Entering) -> Tensor:
        """Map what enters the lowest trained layer to logits of shape (examples, labels)."""
        hidden = entering.hidden
        for block in self.layers[self._first_trained :]:
            hidden = block(hidden, *entering.context)
        logits: Tensor = self.head(hidden, *entering.context)
        return logits

    def accumulate(
        self, entering: Sequence[Entering], labels: Sequence[Tensor], num_examples: int
    ) -> float:
        """Add the gradient of the mean loss, one micro-batch after the other."""
        total = 0.0
        for batch, label_ids in zip(entering, labels, strict=True):
            targets = label_ids.to(self._device)
            loss = F.cross_entropy(self.leave(batch), targets, reduction="sum") / num_examples
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            total += loss.item()
            del loss
            self._settle()
        return total
