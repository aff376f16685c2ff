"""The activation functions that model families share, by the names of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor
from torch.nn import functional as F


def _tanh_gelu(hidden: Tensor) -> Tensor:
    return F.gelu(hidden, approximate="tanh")


ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": F.relu,
    "silu": F.silu,
}
