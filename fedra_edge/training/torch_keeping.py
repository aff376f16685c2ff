"""Keeps tensors that outlive the work on a block out of the heap that this work goes through."""

from __future__ import annotations

import torch
from torch import Tensor

from fedra_edge.training.allocator import own_mapping


def kept_apart(tensor: Tensor) -> Tensor:
    """Copy a tensor's values into memory outside the heap; one on a GPU stays where it is."""
    if tensor.device.type != "cpu":
        return tensor
    apart = torch.frombuffer(own_mapping(tensor.nbytes), dtype=tensor.dtype)
    return apart.view(tensor.shape).copy_(tensor.detach())
