"""A linear layer with a low-rank adapter beside its frozen weight (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from fedra_edge.protocol.models import AdapterSpec


class LoraLinear(nn.Module):
    """Computes W x + b + scale * B (A x); parameters have the names that travel on the wire.

    ``weight`` is W (out, in), ``lora_a`` is A (rank, in), ``lora_b`` is B (out, rank).
    """

    def __init__(self, base: nn.Linear, adapter: AdapterSpec) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.lora_a = nn.Parameter(torch.empty(adapter.rank, base.in_features))
        self.lora_b = nn.Parameter(torch.empty(base.out_features, adapter.rank))
        self.scale = adapter.scale

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        adapted = F.linear(F.linear(hidden, self.lora_a), self.lora_b)
        return F.linear(hidden, self.weight, self.bias) + self.scale * adapted


def attach_adapter(block: nn.Module, adapter: AdapterSpec) -> None:
    """Replace exactly the targeted linear modules of a block.

    Raises:
        AttributeError: A target does not exist.
        TypeError: A target is no linear module.
    """
    for target in adapter.targets:
        base = block.get_submodule(target)
        if not isinstance(base, nn.Linear):
            raise TypeError(f"{target} is no linear module")
        parent, _, name = target.rpartition(".")
        setattr(block.get_submodule(parent), name, LoraLinear(base, adapter))
