"""The gradient rules of matrix products, and of operators that only move elements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from onnx import NodeProto, helper

from fedra_server.modelbook.gradients.forms import (
    MATRIX,
    attributes_of,
    permutation,
    reduce_to,
    reshape_to,
    rows,
    swap,
    transpose,
)
from fedra_server.modelbook.gradients.rules import Rule
from fedra_server.modelbook.gradients.tape import Tape


def _matmul(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    names = node.input[0], node.input[1]
    left, right = (_as_matrix(tape, name, axis) for axis, name in enumerate(names))
    rank = max(tape.rank(left), tape.rank(right))
    if added := [rank - 2 + axis for axis, name in enumerate(names) if tape.rank(name) == 1]:
        shape = list(tape.shape(node.output[0]))
        for axis in added:
            shape.insert(axis, 1)
        gradient = tape.emit("Unsqueeze", gradient, tape.ints(*added))
        tape.shapes[gradient] = tuple(shape)
    results: list[str | None] = [None, None]
    if names[0] in tape.carrying:
        results[0] = _left_factor(tape, left, right, gradient)
    if names[1] in tape.carrying:
        results[1] = _right_factor(tape, left, right, gradient)
    return [
        reshape_to(tape, result, name) if result and tape.rank(name) == 1 else result
        for name, result in zip(names, results, strict=True)
    ]


def _as_matrix(tape: Tape, name: str, axis: int) -> str:
    shape = tape.shape(name)
    if len(shape) > 1:
        return name
    matrix = tape.emit("Unsqueeze", name, tape.ints(axis))
    tape.shapes[matrix] = (*shape[:axis], 1, *shape[axis:])
    return matrix


def _left_factor(tape: Tape, left: str, right: str, gradient: str) -> str:
    """G B^T; one product over all that is summed when A alone has no batch."""
    batch, rank = tape.shape(gradient)[:-2], tape.rank(gradient)
    if tape.rank(left) == MATRIX < rank:
        perm = [rank - 2, *range(rank - 2), rank - 1]
        flat = [
            tape.emit("Flatten", transpose(tape, name, perm), axis=1) for name in (gradient, right)
        ]
        return tape.emit("Gemm", *flat, transB=1)
    product = tape.emit("MatMul", gradient, swap(tape, right))
    return reduce_to(tape, product, (*batch, *tape.shape(left)[-2:]), left)


def _right_factor(tape: Tape, left: str, right: str, gradient: str) -> str:
    """A^T G; one product over all rows when B, a weight, has no batch."""
    if tape.rank(right) == MATRIX:
        return tape.emit("Gemm", rows(tape, left), rows(tape, gradient), transA=1)
    product = tape.emit("MatMul", swap(tape, left), gradient)
    batch = tape.shape(gradient)[:-2]
    return reduce_to(tape, product, (*batch, *tape.shape(right)[-2:]), right)


def _gemm(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    left, right, *added = node.input
    given = attributes_of(node)
    left_turned, right_turned = given.get("transA", 0), given.get("transB", 0)
    alpha = {"alpha": given["alpha"]} if given.get("alpha", 1.0) != 1 else {}
    results: list[str | None] = [None] * len(node.input)
    if left in tape.carrying:
        pair = (right, gradient) if left_turned else (gradient, right)
        turned = (right_turned, 1) if left_turned else (0, 1 - right_turned)
        results[0] = _product(tape, pair, turned, alpha)
    if right in tape.carrying:
        pair = (gradient, left) if right_turned else (left, gradient)
        turned = (1, left_turned) if right_turned else (1 - left_turned, 0)
        results[1] = _product(tape, pair, turned, alpha)
    if added and added[0] in tape.carrying:
        summed = reduce_to(tape, gradient, tape.shape(node.output[0]), added[0])
        beta = given.get("beta", 1.0)
        scaled = tape.emit("Mul", summed, tape.scalar(beta, added[0])) if beta != 1 else summed
        results[2] = scaled
    return results


def _product(
    tape: Tape, pair: tuple[str, str], turned: tuple[int, int], alpha: Mapping[str, float]
) -> str:
    flags = {name: 1 for name, flag in zip(("transA", "transB"), turned, strict=True) if flag}
    return tape.emit("Gemm", *pair, **flags, **alpha)


def _conv(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    """Pull back to the input alone, whose size, kernel's and output's must be known."""
    given = attributes_of(node)
    if given.pop("auto_pad", b"NOTSET") != b"NOTSET":
        return []
    shapes = [tape.shape(name)[2:] for name in (node.input[0], node.output[0], node.input[1])]
    sizes, results, kernel = ([dim for dim in dims if isinstance(dim, int)] for dims in shapes)
    axes = range(len(shapes[0]))
    if any(len(known) != len(axes) for known in (sizes, results, kernel)):
        return []
    strides, dilations = (given.get(name, [1] * len(axes)) for name in ("strides", "dilations"))
    pads = given.get("pads", [0] * (2 * len(axes)))
    given["output_padding"] = [
        sizes[axis] + pads[axis] + pads[axis + len(axes)]
        - (results[axis] - 1) * strides[axis] - dilations[axis] * (kernel[axis] - 1) - 1
        for axis in axes
    ]  # fmt: skip
    return [tape.emit("ConvTranspose", gradient, node.input[1], **given)]


def _transpose(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    perm = permutation(node, tape.rank(node.input[0]))
    return [transpose(tape, gradient, np.argsort(perm).tolist())]


def _reshape(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    return [reshape_to(tape, gradient, node.input[0])]


def _dropout(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    training = tape.known(node, 2)
    return [] if training is not None and training.any() else [gradient]


def _expand(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    return [reduce_to(tape, gradient, tape.shape(node.output[0]), node.input[0])]


def _concat(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    axis = attributes_of(node)["axis"]
    lengths = [tape.shape(name)[axis] for name in node.input]
    known = [length for length in lengths if isinstance(length, int)]
    if len(known) == len(lengths):
        sizes = tape.ints(*known)
    else:
        sizes = tape.emit("Concat", *(_length(tape, name, axis) for name in node.input), axis=0)
    parts = tape.split(gradient, sizes, len(lengths), axis)
    return [
        part if name in tape.carrying else None
        for name, part in zip(node.input, parts, strict=True)
    ]


def _split(tape: Tape, node: NodeProto, _: str) -> list[str | None]:
    parts = [
        tape.gradients.get(name) or _zeros(tape, tape.shape_vector(name), name)
        for name in node.output
    ]
    return [tape.emit("Concat", *parts, axis=attributes_of(node).get("axis", 0))]


def _slice(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    shape = tape.shape(node.input[0])
    starts, ends, axes, steps = (tape.known(node, index) for index in range(1, 5))
    if starts is None or ends is None:
        return []
    used = list(range(len(starts))) if axes is None else [axis % len(shape) for axis in axes]
    if steps is None or (steps == 1).all():
        return [_padded(tape, node, gradient, dict(zip(used, starts.tolist(), strict=True)))]
    length = shape[used[0]]
    if len(used) > 1 or not isinstance(length, int):
        return []
    chosen = range(length)[slice(int(starts[0]), int(ends[0]), int(steps[0]))]
    return [_scattered(tape, node, gradient, used[0], tape.ints(*chosen))]


def _gather(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    axis = attributes_of(node).get("axis", 0) % tape.rank(node.input[0])
    indices = tape.constants.get(node.input[1])
    if indices is not None and indices.size == 1:
        if indices.ndim == 0:
            shape = tape.shape(gradient)
            gradient = tape.emit("Unsqueeze", gradient, tape.ints(axis))
            tape.shapes[gradient] = (*shape[:axis], 1, *shape[axis:])
        if indices.ndim <= 1:
            return [_padded(tape, node, gradient, {axis: int(indices.item())})]
    if tape.rank(node.input[1]) != 1:
        return []
    return [_scattered(tape, node, gradient, axis, node.input[1])]


def _gather_elements(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    name, indices = node.input
    zeros = _zeros(tape, tape.shape_vector(name), name)
    axis = attributes_of(node).get("axis", 0)
    return [
        tape.emit("ScatterElements", zeros, indices, gradient, axis=axis, reduction="add"), None
    ]  # fmt: skip


def _gather_nd(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    """Put back what was picked by indices, or by one for each example, such as the last token."""
    name, indices = node.input
    batch = attributes_of(node).get("batch_dims", 0)
    if batch == 0:
        zeros = _zeros(tape, tape.shape_vector(name), name)
        return [tape.emit("ScatterND", zeros, indices, gradient, reduction="add"), None]
    if tape.rank(indices) != batch + 1 or tape.shape(indices)[-1] != 1:
        return []
    rest = tape.ints(*range(batch + 1, tape.rank(name)))
    spread = tape.emit("Unsqueeze", gradient, tape.ints(batch))
    places = tape.emit("Expand", tape.emit("Unsqueeze", indices, rest), tape.emit("Shape", spread))
    zeros = _zeros(tape, tape.shape_vector(name), name)
    return [tape.emit("ScatterElements", zeros, places, spread, axis=batch, reduction="add"), None]


def _scattered(tape: Tape, node: NodeProto, gradient: str, axis: int, indices: str) -> str:
    """Add what was picked along one axis by a vector of indices to where it came from."""
    name = node.input[0]
    others = [other for other in range(tape.rank(name)) if other != axis]
    column = tape.emit("Unsqueeze", indices, tape.ints(*others)) if others else indices
    places = tape.emit("Expand", column, tape.shape_vector(node.output[0]))
    zeros = _zeros(tape, tape.shape_vector(name), name)
    return tape.emit("ScatterElements", zeros, places, gradient, axis=axis, reduction="add")


def _padded(tape: Tape, node: NodeProto, gradient: str, starts: Mapping[int, int]) -> str:
    """Surround what was cut out, from one start for each axis, by zeros."""
    before, after = [], []
    for axis, start in starts.items():
        length = _length(tape, node.input[0], axis)
        begin = tape.ints(start)
        if start < 0:
            begin = tape.emit("Max", tape.emit("Add", length, begin), tape.ints(0))
        kept = _length(tape, gradient, axis)
        before.append(begin)
        after.append(tape.emit("Sub", tape.emit("Sub", length, kept), begin))
    pads = tape.emit("Concat", *before, *after, axis=0)
    zero = tape.scalar(0.0, node.input[0])
    return tape.emit("Pad", gradient, pads, zero, tape.ints(*starts))


def _length(tape: Tape, name: str, axis: int) -> str:
    """Give a value's length along an axis, as a vector of one."""
    length = tape.shape(name)[axis]
    if isinstance(length, int):
        return tape.ints(length)
    return tape.emit("Gather", tape.emit("Shape", name), tape.ints(axis))


def _zeros(tape: Tape, shape: str, like: str) -> str:
    value = helper.make_tensor("zero", tape.type_of(like), [1], [0.0])
    return tape.emit("ConstantOfShape", shape, value=value)


MOVING: Final[Mapping[str, Rule]] = {
    "Concat": _concat,
    "Conv": _conv,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
