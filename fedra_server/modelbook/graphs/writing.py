"""Writes ONNX graphs of standard operators in which every weight is an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET: Final = 18
IR_VERSION: Final = 10
"""The newest pair that every supported onnxruntime reads, 1.19 and later."""

Dim = int | str
"""A size, or the name of one that is known only when the graph runs."""


class GraphWriter:
    """A graph in the making; every method that computes something gives the name of the result.

    Names are numbered in the order of writing, so the same calls give the same bytes.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: dict[str, onnx.ValueInfoProto] = {}
        self._outputs: list[onnx.ValueInfoProto] = []
        self._output_names: dict[str, str] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}

    def input(self, name: str, shape: Sequence[Dim], dtype: int = TensorProto.FLOAT) -> str:
        """Declare an input; naming one again gives the same one."""
        self._inputs.setdefault(name, helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:  # noqa: ANN401 (of any operator)
        """Compute one operator with one result."""
        return self.add_many(operator, *inputs, count=1, **attributes)[0]

    def add_many(self, operator: str, *inputs: str, count: int, **attributes: Any) -> list[str]:  # noqa: ANN401 (as above)
        """Compute one operator with several results."""
        name = f"{operator}_{len(self._nodes)}"
        outputs = [name if index == 0 else f"{name}_{index}" for index in range(count)]
        self._nodes.append(helper.make_node(operator, inputs, outputs, name, **attributes))
        return outputs

    def floats(self, *values: float) -> str:
        """Hold float32 constants: a single number as a scalar, more of them as a row."""
        array = np.array(values[0] if len(values) == 1 else values, dtype=np.float32)
        return self._constant(array)

    def ints(self, *values: int) -> str:
        """Hold a row of int64 constants, such as a shape."""
        return self._constant(np.array(values, dtype=np.int64))

    def index(self, value: int) -> str:
        """Hold an int64 scalar."""
        return self._constant(np.array(value, dtype=np.int64))

    def output(
        self, value: str, name: str, shape: Sequence[Dim], dtype: int = TensorProto.FLOAT
    ) -> None:
        """Give a result, that of a node, out under a name of its own."""
        self._output_names[value] = name
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def model(self) -> onnx.ModelProto:
        """Finish the graph."""
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [self._output_names.get(name, name) for name in names]
        graph = helper.make_graph(
            self._nodes,
            self._name,
            list(self._inputs.values()),
            self._outputs,
            list(self._constants.values()),
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(
            graph, ir_version=IR_VERSION, opset_imports=[opset], producer_name="fedra"
        )

    def _constant(self, array: NDArray[Any]) -> str:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = numpy_helper.from_array(array, name)
        return self._constants[key].name
