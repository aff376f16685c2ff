"""What gradient rules write with: the forward values they may use, and nodes as they are added."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.gradients.shapes import Shape, infer_shapes

_Key = tuple[object, ...]
_FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}
# Their gradient is zero wherever it exists.
_FLAT = {"Shape", "Size", "Floor", "Ceil", "Round", "Sign", "ConstantOfShape"}


class Tape:
    """A forward graph and the backward nodes written after it.

    ``gradients`` holds the gradient of each forward value as far as it is summed up;
    ``carrying`` are the values that depend on ``wrt``, so those that need one.
    """

    def __init__(self, model: ModelProto, wrt: Iterable[str]) -> None:
        self.shapes, self._types = infer_shapes(model)
        self.constants = dict(_constants(model))
        self.nodes = [_copy(node) for node in model.graph.node if node.op_type != "Constant"]
        self.forward = tuple(self.nodes)
        self.gradients: dict[str, str] = {}
        self._producers = {name: node for node in self.nodes for name in node.output}
        self._known: dict[_Key, str] = {
            _key(node): node.output[0] for node in self.nodes if len(node.output) == 1
        }
        self._taken = {value.name for value in model.graph.input} | {*self._producers}
        self._taken |= {*self.constants}
        self.carrying = set(wrt)
        for node in self.forward:
            if node.op_type not in _FLAT and self.carrying.intersection(node.input):
                floats = (name for name in node.output if self._types.get(name, 1) in _FLOATS)
                self.carrying.update(floats)

    def shape(self, name: str) -> Shape:
        """Give a value's dimensions: numbers, or names of what is open."""
        if name not in self.shapes:
            raise ConfigurationError(
                f"the number of dimensions of {name!r} cannot be told from the graph",
                remedy="Export the model with fixed sizes, apart from the batch.",
            )
        return self.shapes[name]

    def rank(self, name: str) -> int:
        """Count a value's dimensions."""
        return len(self.shape(name))

    def producer(self, name: str, op_type: str) -> NodeProto | None:
        """Give the node that makes a value, when it is of one kind."""
        node = self._producers.get(name)
        return node if node is not None and node.op_type == op_type else None

    def known(self, node: NodeProto, index: int) -> npt.NDArray[Any] | None:
        """Give an optional input that has to be a constant, ``None`` when it is left out."""
        if index >= len(node.input) or not node.input[index]:
            return None
        if node.input[index] not in self.constants:
            raise ConfigurationError(
                f"input {index} of a {node.op_type} node is computed, not constant",
                remedy="Export the model with fixed sizes, or simplify its graph first.",
            )
        return self.constants[node.input[index]]

    def emit(self, op_type: str, *inputs: str, **attributes: Any) -> str:  # noqa: ANN401 (of any operator)
        """Write a node with one output, unless the same is there already."""
        node = helper.make_node(op_type, inputs, [], **attributes)
        key = _key(node)
        if key not in self._known:
            node.output.append(self.fresh())
            self._known[key] = self._append(node)[0]
        return self._known[key]

    def split(self, value: str, sizes: str, count: int, axis: int) -> list[str]:
        """Write a Split node, the one kind with several outputs that rules need."""
        outputs = [self.fresh() for _ in range(count)]
        return self._append(helper.make_node("Split", [value, sizes], outputs, axis=axis))

    def name_outputs(self, node: NodeProto, count: int) -> list[str]:
        """Let a forward node give results that it could but did not."""
        given = [*node.output, *[""] * (count - len(node.output))]
        node.output[:] = [name or self.fresh() for name in given]
        return list(node.output)

    def fresh(self) -> str:
        """Give a name that nothing has yet."""
        name = f"vjp_{len(self._taken)}"
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def constant(self, value: npt.NDArray[Any]) -> str:
        """Give the name of a constant, one for all that are equal."""
        for name, known in self.constants.items():
            same_kind = known.dtype == value.dtype and known.shape == value.shape
            if same_kind and np.array_equal(known, value):
                return name
        name = self.fresh()
        self.constants[name] = value
        self.shapes[name] = value.shape
        return name

    def ints(self, *values: int) -> str:
        """Give a constant vector of sizes or axes."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float, like: str) -> str:
        """Give a constant of the type of a forward value."""
        dtype = helper.tensor_dtype_to_np_dtype(self._types.get(like, TensorProto.FLOAT))
        return self.constant(np.array(value, dtype))

    def number(self, name: str) -> float | None:
        """Give a constant that is a single number without axes."""
        value = self.constants.get(name)
        return float(value) if value is not None and value.shape == () else None

    def type_of(self, name: str) -> int:
        """Give a forward value's element type."""
        return self._types.get(name, TensorProto.FLOAT)

    def shape_vector(self, name: str) -> str:
        """Give a value's shape as a tensor, a constant if it can be."""
        shape = self.shape(name)
        sizes = [dim for dim in shape if isinstance(dim, int)]
        return self.ints(*sizes) if len(sizes) == len(shape) else self.emit("Shape", name)

    def _append(self, node: NodeProto) -> list[str]:
        self.nodes.append(node)
        self._producers |= dict.fromkeys(node.output, node)
        return list(node.output)


def _constants(model: ModelProto) -> Iterable[tuple[str, npt.NDArray[Any]]]:
    inputs = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.name not in inputs:
            yield tensor.name, numpy_helper.to_array(tensor)
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield node.output[0], _constant_of(node.attribute[0])


def _constant_of(attribute: AttributeProto) -> npt.NDArray[Any]:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    return np.array(value, np.float32 if attribute.name.startswith("value_float") else None)


def _copy(node: NodeProto) -> NodeProto:
    copied = NodeProto()
    copied.CopyFrom(node)
    return copied


def _key(node: NodeProto) -> _Key:
    attributes = sorted(attribute.SerializeToString() for attribute in node.attribute)
    return node.domain, node.op_type, *node.input, *attributes
