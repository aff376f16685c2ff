"""Keeps tensors that outlive a block's work out of the heap."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedra_edge.training.allocator import own_mapping


def kept_apart(tensor: Tensor) -> Tensor:
    """Copy a tensor into memory outside the heap; one on a GPU stays where it is."""
    if tensor.device.type != "cpu":
        return tensor
    buffer = np.frombuffer(own_mapping(max(1, tensor.nbytes)), np.uint8, tensor.nbytes)
    return torch.from_numpy(buffer).view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
