"""Packs a piece into the bytes of its file, its frozen tensors in the format asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import torch
from safetensors.torch import save
from torch import Tensor

from fedra_edge.protocol.tensors import serialize_tensors
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.splitting import Arrays
from fedra_server.modelbook.stored_dtypes import WeightsDtype

_HALVES: Final[Mapping[WeightsDtype, torch.dtype]] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_WIDER: Final[Mapping[WeightsDtype, WeightsDtype]] = {
    "bfloat16": "float32",
    "float16": "bfloat16",
}


def pack_piece(arrays: Arrays, weights_dtype: WeightsDtype, trained: Collection[str]) -> bytes:
    """Write a piece with its frozen tensors rounded to a format and the trained ones as they are.

    The same arrays always give the same bytes.

    Raises:
        ConfigurationError: A finite value is too large for the format.
    """
    if weights_dtype == "float32":
        return serialize_tensors(arrays)
    tensors = {name: torch.from_numpy(array).contiguous() for name, array in arrays.items()}
    frozen = [name for name in tensors if name not in trained]
    return save(tensors | {name: _rounded(name, tensors[name], weights_dtype) for name in frozen})


def _rounded(name: str, original: Tensor, weights_dtype: WeightsDtype) -> Tensor:
    rounded = original.to(_HALVES[weights_dtype])
    if (rounded.isinf() & original.isfinite()).any():
        raise ConfigurationError(
            f"{name} holds a value too large for {weights_dtype}",
            remedy=f"Register the model with --weights-dtype {_WIDER[weights_dtype]}.",
        )
    return rounded
