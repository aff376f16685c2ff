"""Finds out the shapes inside an ONNX graph, with names for sizes that are open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

from onnx import ModelProto, ValueInfoProto, helper, shape_inference

Shape = tuple[int | str, ...]


def infer_shapes(model: ModelProto) -> tuple[dict[str, Shape], dict[str, int]]:
    """Give the shapes and element types of all values that can be known.

    Beyond what ONNX infers, the open size of a Reshape is worked out where it is one of those
    that went in, so that residual connections are seen to join equals.
    """
    resolved: dict[str, ValueInfoProto] = {}
    while True:
        shapes, types = _infer(model, resolved)
        found = {
            node.output[0]: shape
            for node in model.graph.node
            if node.op_type == "Reshape"
            and (shape := _reshaped(shapes.get(node.input[0]), shapes.get(node.output[0])))
        }
        if not found:
            return shapes, types
        resolved |= {
            name: helper.make_tensor_value_info(name, types[name], shape)
            for name, shape in found.items()
        }


def _infer(
    model: ModelProto, resolved: Mapping[str, ValueInfoProto]
) -> tuple[dict[str, Shape], dict[str, int]]:
    draft = ModelProto()
    draft.CopyFrom(model)
    kept = [value for value in draft.graph.value_info if value.name not in resolved]
    del draft.graph.value_info[:]
    draft.graph.value_info.extend([*kept, *resolved.values()])
    graph = shape_inference.infer_shapes(draft, data_prop=True).graph
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor_type = value.type.tensor_type
        types[value.name] = tensor_type.elem_type
        if tensor_type.HasField("shape"):
            shapes[value.name] = tuple(
                dim.dim_value
                if dim.HasField("dim_value")
                else dim.dim_param or f"{value.name}:{axis}"
                for axis, dim in enumerate(tensor_type.shape.dim)
            )
    return shapes, types


def _reshaped(before: Shape | None, after: Shape | None) -> Shape | None:
    """Replace the one size that inference left open by what must be there."""
    if before is None or after is None or 0 in after:
        return None
    left = Counter(dim for dim in before if isinstance(dim, str))
    names = Counter(dim for dim in after if isinstance(dim, str))
    opened = [dim for dim in after if isinstance(dim, str) and dim.startswith("unk__")]
    opened = [dim for dim in opened if dim not in left]
    if len(opened) != 1 or names - left != Counter(opened):
        return None
    size, rest = divmod(
        prod(dim for dim in before if isinstance(dim, int)),
        prod(dim for dim in after if isinstance(dim, int)),
    )
    remaining = [*(left - names).elements()]
    if rest or len(remaining) > 1 or (remaining and size != 1):
        return None
    answer = remaining[0] if remaining else size
    return tuple(answer if dim == opened[0] else dim for dim in after)
