"""Reads pieces of weights one after the other, with the next on its way while one is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedra_edge.training.prefetching import prefetch
from fedra_edge.training.torch_blocks import read_piece

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Coming:
    """A piece being copied to a GPU; the pinned source must live until the copy is done."""

    piece: str
    source: Mapping[str, Tensor]
    tensors: dict[str, Tensor]
    copied: torch.cuda.Event


class PieceReader:
    """Gives pieces on a device.

    On the CPU they stay in their files, and the system is asked to read ahead. On a GPU the next
    piece is copied from pinned memory by a stream of its own while another is computed with.
    """

    def __init__(self, weights: Mapping[str, Path], device: torch.device) -> None:
        self._weights = weights
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._coming: _Coming | None = None

    def read(self, piece: str, following: str | None = None) -> dict[str, Tensor]:
        """Give a piece, and start to bring the following one.

        Raises:
            SliceError: A file is no file of weights.
        """
        if self._stream is None:
            if following is not None:
                prefetch(self._weights[following])
            return read_piece(self._weights[piece], self._device)
        coming = self._coming
        if coming is None or coming.piece != piece:
            coming = self._copy(piece, self._stream)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(coming.copied)
        for tensor in coming.tensors.values():
            tensor.record_stream(current)
        self._coming = None if following is None else self._copy(following, self._stream)
        return coming.tensors

    def _copy(self, piece: str, stream: torch.cuda.Stream) -> _Coming:
        on_disk = read_piece(self._weights[piece], _CPU)
        source = {name: tensor.pin_memory() for name, tensor in on_disk.items()}
        with torch.cuda.stream(stream):
            tensors = {
                name: tensor.to(self._device, non_blocking=True) for name, tensor in source.items()
            }
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # as above
            copied.record(stream)
        return _Coming(piece, source, tensors, copied)
