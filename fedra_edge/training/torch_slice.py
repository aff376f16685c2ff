"""A resident slice: stem, the slice's layers by position, head, as one PyTorch module."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fedra_edge.protocol.ids import LayerId, Position
from fedra_edge.protocol.layers import HEAD, STEM, LayerPositions, TensorKey, layer_piece
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.torch_blocks import (
    build_block,
    build_head,
    build_stem,
    fill_block,
    fill_head,
    fill_stem,
    read_piece,
)
from fedra_edge.training.trainer import SliceWork


class TrainableSlice(Protocol):
    """A slice that gradients can be accumulated in, whatever part of it is in memory."""

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """The tensors that are trained, by global name."""
        ...

    def accumulate(
        self, images: Sequence[Tensor], labels: Sequence[Tensor], num_examples: int
    ) -> float:
        """Add the gradient of the mean loss to the trained tensors.

        Args:
            images: Micro-batches of shape (n_i, channels, size, size).
            labels: Their label ids, of shape (n_i,).
            num_examples: What the mean is taken over, usually the whole batch.

        Returns:
            The part of the mean loss that these examples make.
        """
        ...

    def trained_values(self) -> dict[str, FloatArray]:
        """Copy the trained tensors out, by global name."""
        ...


class TorchSlice(nn.Module):
    """The layers of a slice in memory, at positions 0, 1, 2 ...; layers not listed are skipped.

    Only the adapters of trained layers and the head's trained tensors require gradients.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: dict[LayerId, nn.Module],
        head: nn.Module,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._device = device
        self.positions = LayerPositions.of(sorted(blocks))
        self.stem = stem
        self.layers = nn.ModuleList(blocks[layer_id] for layer_id in self.positions.layer_ids)
        self.head = head
        self.trained: dict[str, nn.Parameter] = {}
        self._first_trained = Position(len(self.layers))

    @classmethod
    def load(cls, work: SliceWork, device: torch.device) -> Self:
        """Build a slice, fill it and mark what is trained.

        Raises:
            SliceError: A piece does not fit the model.
        """
        spec, manifest = work.spec, work.manifest
        stem, head = build_stem(spec), build_head(spec)
        fill_stem(stem, read_piece(work.weights[STEM], device))
        fill_head(head, read_piece(work.weights[HEAD], device), work.adapters, device)
        blocks = {}
        for layer_id in manifest.layer_ids:
            blocks[layer_id] = block = build_block(spec, manifest.adapter)
            weights = read_piece(work.weights[layer_piece(layer_id)], device)
            fill_block(block, weights, work.adapters, layer_id, device)
        loaded = cls(stem, blocks, head, device)
        loaded._mark_trained(
            spec.delta_shapes(manifest.adapter, manifest.trained_layer_ids),
            manifest.trained_layer_ids,
        )
        return loaded

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits; nothing below the lowest trained layer keeps activations."""
        with torch.no_grad():
            hidden: Tensor = self.stem(images)
            for block in self.layers[: self._first_trained]:
                hidden = block(hidden)
        for block in self.layers[self._first_trained :]:
            hidden = block(hidden)
        logits: Tensor = self.head(hidden)
        return logits

    def accumulate(
        self, images: Sequence[Tensor], labels: Sequence[Tensor], num_examples: int
    ) -> float:
        """Add the gradient of the mean loss, one micro-batch after the other."""
        total = 0.0
        for image, label_ids in zip(images, labels, strict=True):
            logits = self(image.to(self._device))
            targets = label_ids.to(self._device)
            loss = F.cross_entropy(logits, targets, reduction="sum") / num_examples
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            total += loss.item()
        return total

    def trained_values(self) -> dict[str, FloatArray]:
        """Copy the trained tensors out, by global name."""
        return {
            name: parameter.detach().cpu().numpy().copy()
            for name, parameter in self.trained.items()
        }

    def _mark_trained(self, names: Collection[str], layer_ids: tuple[LayerId, ...]) -> None:
        for name in sorted(names):
            key = TensorKey.parse(name)
            parameter = self._piece(key).get_parameter(key.name)
            parameter.requires_grad = True
            self.trained[name] = parameter
        self._first_trained = min(self.positions.position_of(layer_id) for layer_id in layer_ids)

    def _piece(self, key: TensorKey) -> nn.Module:
        if key.layer_id is None:
            return self.head
        return self.layers[self.positions.position_of(key.layer_id)]
