"""A whole model on PyTorch, forward only, one piece after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedra_edge.errors import SliceError
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
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
from fedra_edge.training.torch_slice import Entering
from fedra_edge.training.trainer import InputArray, WholeModel


class TorchForward:
    """Implements ``ForwardEngine``."""

    def __init__(self, model: WholeModel, device: torch.device) -> None:
        self._model = model
        self._device = device

    def stem(self) -> Callable[[InputArray], Entering]:
        """Load the stem; what it gives has found what a batch needs on its way."""
        spec = self._model.spec
        stem = build_stem(spec)
        fill_stem(stem, self._weights(STEM))

        @torch.no_grad()
        def enter(inputs: InputArray) -> Entering:
            batch = torch.from_numpy(inputs).to(self._device)
            return Entering(stem(batch), find_context(spec, batch))

        return enter

    def layers(self) -> Iterator[Callable[[Entering], Entering]]:
        """Load one layer after the other into the same block."""
        spec = self._model.spec
        block = build_block(spec, self._model.adapter)

        @torch.no_grad()
        def pass_on(moving: Entering) -> Entering:
            return Entering(block(moving.hidden, *moving.context), moving.context)

        for layer_id in spec.layer_ids:
            weights = self._weights(layer_piece(layer_id))
            fill_block(block, weights, self._model.adapters, layer_id)
            yield pass_on

    def head(self) -> Callable[[Entering], FloatArray]:
        """Load the head; logits leave the device."""
        head = build_head(self._model.spec)
        fill_head(head, self._weights(HEAD), self._model.adapters)

        @torch.no_grad()
        def leave(moving: Entering) -> FloatArray:
            logits: FloatArray = head(moving.hidden, *moving.context).cpu().numpy()
            return logits

        return leave

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
