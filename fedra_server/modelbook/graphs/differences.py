"""Holds a graph's gradients against finite differences, where there is no PyTorch to ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from fedra_edge.protocol.graphs import GRADIENT
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.graphs.parts import BATCH, TOKENS
from fedra_server.modelbook.graphs.running import run_graph

Values = Mapping[str, NDArray[Any]]

_SIZES: Final = {BATCH: 2, TOKENS: 5}
_OTHER_SIZE: Final = 3
_STEP: Final = np.float32(1e-3)
_TOLERANCE: Final = 2e-2
"""What the differences of float32 numbers and the curve itself leave of exactness."""
_TINY: Final = 1e-30


def random_values(graph: onnx.ModelProto, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Draw every input of a graph: small floats, and zeros for whatever counts something."""
    generator = np.random.default_rng(seed)
    values = {}
    for it in graph.graph.input:
        tensor = it.type.tensor_type
        shape = [
            dim.dim_value or _SIZES.get(dim.dim_param, _OTHER_SIZE) for dim in tensor.shape.dim
        ]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        fan_in = max(shape[1:], default=1)
        drawn = generator.normal(0.0, fan_in**-0.5, shape)
        is_float = np.issubdtype(dtype, np.floating)
        values[it.name] = (drawn if is_float else np.zeros(shape)).astype(dtype)
    return values


def check_by_differences(
    forward: onnx.ModelProto, vjp: onnx.ModelProto, wrt: Mapping[str, str], values: Values
) -> None:
    """Step along one direction of each input and compare with what its gradient tells.

    Args:
        forward: A graph; its first output is the one that is differentiated.
        vjp: What gives the gradients.
        wrt: For each differentiated input, the name of its gradient.
        values: A value for every input of ``forward``.

    Raises:
        ConfigurationError: A gradient is not that of the forward graph.
    """
    output = forward.graph.output[0].name
    generator = np.random.default_rng(0)
    shape = run_graph(forward, values)[output].shape
    gradient = generator.normal(size=shape).astype(np.float32)
    gradients = run_graph(vjp, {**values, GRADIENT: gradient})
    for name, gradient_name in wrt.items():
        direction = _direction(gradients[gradient_name], generator)
        step = _STEP * np.float32(np.linalg.norm(values[name]) or 1.0)
        above, below = (
            run_graph(forward, {**values, name: values[name] + signed * direction})[output]
            for signed in (step, -step)
        )
        difference = (above - below).astype(np.float64)
        measured = float(np.vdot(difference, gradient)) / (2 * float(step))
        told = float(np.vdot(gradients[gradient_name].astype(np.float64), direction))
        if not abs(told - measured) <= _TOLERANCE * max(abs(told), abs(measured)):
            raise ConfigurationError(
                f"the gradient of {name} is wrong: {told:.4g} along a direction "
                f"in which the graph changes by {measured:.4g}"
            )


def _direction(gradient: NDArray[Any], generator: np.random.Generator) -> NDArray[Any]:
    """Go halfway along the gradient, for a change that stands out, and halfway at random."""
    drawn = generator.normal(size=gradient.shape)
    mixed = drawn / np.linalg.norm(drawn) + gradient / max(np.linalg.norm(gradient), _TINY)
    return np.asarray(mixed / np.linalg.norm(mixed), dtype=np.float32)
