"""Places adapters in a block's graph: LoRA (arXiv 2106.09685) on linear layers named by weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import onnx
from onnx import TensorProto, helper

from fedra_edge.protocol.graphs import LORA_SCALE
from fedra_edge.protocol.layers import LORA_A, LORA_B
from fedra_server.errors import ConfigurationError

RANK: Final = "r"
_MARK: Final = "lora/"
_REMEDY: Final = "Choose other targets: linear layers of a block, by the names of their weights."


class _Linear(NamedTuple):
    """The node at ``place`` that multiplies by a weight, and the features it maps."""

    place: int
    node: onnx.NodeProto
    out_features: int
    in_features: int
    is_out_first: bool


def place_adapters(block: onnx.ModelProto, targets: Sequence[str]) -> onnx.ModelProto:
    """Add scale * B (A x) to what each target's matrix product gives, on a copy of the graph.

    The weight of target T is the input ``T.weight``, stored either way around, and goes into a
    MatMul or Gemm, directly or through one Transpose. New inputs are ``T.lora_a`` (rank, in),
    ``T.lora_b`` (out, rank) and the scalar ``lora_scale``.

    Raises:
        ConfigurationError: A target is no such layer.
    """
    adapted = onnx.ModelProto()
    adapted.CopyFrom(block)
    graph = adapted.graph
    for target in targets:
        found = _find_linear(graph, target)
        shapes: dict[str, list[int | str]] = {
            f"{target}.{LORA_A}": [RANK, found.in_features],
            f"{target}.{LORA_B}": [found.out_features, RANK],
        }
        for name, shape in shapes.items():
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        _insert(graph, found, target)
    if targets:
        graph.input.append(helper.make_tensor_value_info(LORA_SCALE, TensorProto.FLOAT, []))
    return adapted


def remove_adapters(block: onnx.ModelProto) -> onnx.ModelProto:
    """Give a copy of a block's graph without the adapters that ``place_adapters`` placed."""
    bare = onnx.ModelProto()
    bare.CopyFrom(block)
    placed = [node for node in block.graph.node if node.name.startswith(_MARK)]
    joined = {node.input[0]: node.output[0] for node in placed if node.op_type == "Add"}
    del bare.graph.node[:], bare.graph.input[:]
    for node in block.graph.node:
        if not node.name.startswith(_MARK):
            kept = bare.graph.node.add()
            kept.CopyFrom(node)
            kept.output[:] = [joined.get(name, name) for name in node.output]
    bare.graph.input.extend(
        it
        for it in block.graph.input
        if it.name != LORA_SCALE and it.name.rpartition(".")[2] not in {LORA_A, LORA_B}
    )
    return bare


def is_stored_out_first(block: onnx.ModelProto, target: str) -> bool:
    """Tell whether the weight of a linear layer is stored as (out, in), not as (in, out).

    Raises:
        ConfigurationError: The target is no such layer.
    """
    return _find_linear(block.graph, target).is_out_first


def _find_linear(graph: onnx.GraphProto, target: str) -> _Linear:
    weight = next((it for it in graph.input if it.name == f"{target}.weight"), None)
    if weight is None:
        raise _no_place(target, "no input of the block is its weight")
    rows, columns = _matrix_shape(weight, target)
    is_turned, name = False, weight.name
    users = _users(graph, name)
    if len(users) == 1 and users[0][1].op_type == "Transpose":
        is_turned, name = True, users[0][1].output[0]
        users = _users(graph, name)
    if len(users) != 1 or users[0][1].op_type not in {"MatMul", "Gemm"}:
        raise _no_place(target, "its weight does not go into exactly one matrix product")
    place, node = users[0]
    settings = {it.name: helper.get_attribute_value(it) for it in node.attribute}
    if node.input[1] != name or settings.get("transA", 0):
        raise _no_place(target, "its weight is not the right factor of the product")
    if settings.get("alpha", 1.0) != 1.0:
        raise _no_place(target, "its product is scaled")
    is_out_first = is_turned != bool(settings.get("transB", 0))
    out_features, in_features = (rows, columns) if is_out_first else (columns, rows)
    return _Linear(place, node, out_features, in_features, is_out_first)


def _matrix_shape(weight: onnx.ValueInfoProto, target: str) -> tuple[int, int]:
    try:
        rows, columns = (dim.dim_value for dim in weight.type.tensor_type.shape.dim)
    except ValueError:
        raise _no_place(target, "its weight is no matrix") from None
    return rows, columns


def _users(graph: onnx.GraphProto, name: str) -> list[tuple[int, onnx.NodeProto]]:
    return [(index, node) for index, node in enumerate(graph.node) if name in node.input]


def _insert(graph: onnx.GraphProto, found: _Linear, target: str) -> None:
    """Let the product give its result under another name, and the sum with the adapter under it."""
    entering, leaving, mark = found.node.input[0], found.node.output[0], f"{_MARK}{target}"
    frozen = f"{mark}/frozen"
    found.node.output[0] = frozen
    steps = (
        ("Transpose", [f"{target}.{LORA_A}"], f"{mark}/down"),
        ("MatMul", [entering, f"{mark}/down"], f"{mark}/low"),
        ("Mul", [f"{mark}/low", LORA_SCALE], f"{mark}/scaled"),
        ("Transpose", [f"{target}.{LORA_B}"], f"{mark}/up"),
        ("MatMul", [f"{mark}/scaled", f"{mark}/up"], f"{mark}/added"),
        ("Add", [frozen, f"{mark}/added"], leaving),
    )
    for offset, (operator, inputs, output) in enumerate(steps, start=1):
        node = helper.make_node(operator, inputs, [output], f"{mark}/{offset}")
        if operator == "Transpose":
            node.attribute.append(helper.make_attribute("perm", [1, 0]))
        graph.node.insert(found.place + offset, node)


def _no_place(target: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"no adapter can be placed on {target!r}: {reason}", remedy=_REMEDY)
