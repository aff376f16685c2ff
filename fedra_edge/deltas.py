"""What a client sends back: trained minus received, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedra_edge.errors import SliceError
from fedra_edge.protocol.tensors import FloatArray, tensor_parts


def compute_delta(
    received: Mapping[str, FloatArray], trained: Mapping[str, FloatArray]
) -> dict[str, FloatArray]:
    """Subtract the received value from every trained tensor, in float32.

    Raises:
        SliceError: A trained tensor was never received, changed its shape, or is not finite.
    """
    delta: dict[str, FloatArray] = {}
    for name, value in trained.items():
        if name not in received or received[name].shape != value.shape:
            raise SliceError(f"trained tensor {name} does not match what was received")
        delta[name] = np.subtract(value, received[name], dtype=np.float32)
        if not np.isfinite(delta[name]).all():
            raise SliceError(
                f"training diverged: {name} is not finite",
                remedy="Lower the run's learning rate or its clip norm.",
            )
    return delta


def pack_delta(delta: Mapping[str, FloatArray]) -> list[bytes | memoryview]:
    """Give the file that is uploaded, in parts and not copied: the same for the same values."""
    return tensor_parts(delta)
