"""Moves a tensor by the mean of its deltas, as the run's server optimizer says. Pure.

With x the tensor, d the mean, r the learning rate, all element by element:

    fedavg    x + r d
    fedavgm   m = b1 m + d;             x + r m                     (arXiv 1909.06335)
    fedadam   m = b1 m + (1 - b1) d;    x + r m / (sqrt(v) + tau)   (arXiv 2003.00295, Algorithm 2)
              v = b2 v + (1 - b2) d^2
    fedyogi   as fedadam, but  v = v - (1 - b2) d^2 sign(v - d^2)

Moments start at m = 0 and v = tau^2. They are kept in float32, all else is computed in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedra_edge.protocol.tensors import FloatArray
from fedra_server.runs import ServerOptimizerSpec

Float64Array = NDArray[np.float64]

MOMENTUM: Final = "momentum"
VARIANCE: Final = "variance"


def moment_names(optimizer: ServerOptimizerSpec) -> tuple[str, ...]:
    """Name the moments that an optimizer keeps of every tensor."""
    if optimizer.is_adaptive:
        return (MOMENTUM, VARIANCE)
    return (MOMENTUM,) if optimizer.kind == "fedavgm" else ()


def move(
    optimizer: ServerOptimizerSpec,
    tensor: FloatArray,
    mean: Float64Array,
    moments: Mapping[str, FloatArray],
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """Give the moved tensor and its moments after it; without any they start here."""
    start = tensor.astype(np.float64)
    if optimizer.kind == "fedavg":
        return (start + optimizer.rate * mean).astype(np.float32), {}
    beta = optimizer.momentum
    momentum = beta * moments[MOMENTUM].astype(np.float64) if moments else np.zeros_like(mean)
    if not optimizer.is_adaptive:
        momentum = momentum + mean
        moved = start + optimizer.rate * momentum
        return moved.astype(np.float32), {MOMENTUM: momentum.astype(np.float32)}
    momentum = momentum + (1 - beta) * mean
    before = (
        moments[VARIANCE].astype(np.float64) if moments else np.full_like(mean, optimizer.tau**2)
    )
    variance = _variance(optimizer, before, mean * mean)
    moved = start + optimizer.rate * momentum / (np.sqrt(variance) + optimizer.tau)
    kept = {MOMENTUM: momentum.astype(np.float32), VARIANCE: variance.astype(np.float32)}
    return moved.astype(np.float32), kept


def _variance(
    optimizer: ServerOptimizerSpec, before: Float64Array, square: Float64Array
) -> Float64Array:
    """Advance the running variance; it stays above zero."""
    if optimizer.kind == "fedadam":
        return optimizer.beta2 * before + (1 - optimizer.beta2) * square
    return before - (1 - optimizer.beta2) * square * np.sign(before - square)
