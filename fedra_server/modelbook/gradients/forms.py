"""Rearranges values in gradient graphs without passes over memory that are not needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from onnx import NodeProto, helper

from fedra_server.modelbook.gradients.shapes import Shape
from fedra_server.modelbook.gradients.tape import Tape

MATRIX: Final = 2
"""How many axes a matrix has."""


def reduce_to(tape: Tape, value: str, shape: Shape, target: str) -> str:
    """Sum a value of one shape over the axes along which ``target`` was broadcast."""
    wanted = tape.shape(target)
    extra = len(shape) - len(wanted)
    pairs = list(zip(shape[extra:], wanted, strict=True))
    if extra:
        value = tape.emit("ReduceSum", value, tape.ints(*range(extra)), keepdims=0)
    if summed := [axis for axis, (size, dim) in enumerate(pairs) if dim == 1 and size != 1]:
        value = tape.emit("ReduceSum", value, tape.ints(*summed), keepdims=1)
    if any(size != dim and not isinstance(dim, int) for size, dim in pairs):
        value = _reduce_when_run(tape, value, target)
    return value


def _reduce_when_run(tape: Tape, value: str, target: str) -> str:
    """Sum over the axes whose sizes turn out to differ."""
    same = tape.emit("Equal", tape.emit("Shape", value), tape.emit("Shape", target))
    axes = tape.emit("Squeeze", tape.emit("NonZero", tape.emit("Not", same)), tape.ints(0))
    return tape.emit("ReduceSum", value, axes, keepdims=1, noop_with_empty_axes=1)


def reshape_to(tape: Tape, value: str, target: str) -> str:
    """Give a value the shape of another one with as many elements."""
    shape = tape.shape(target)
    source = _before_reshape(tape, value)
    if tape.shapes.get(source) == shape:
        return source
    before = tape.shapes.get(value, ())
    sizes = [
        dim if isinstance(dim, int) else 0 if before[axis : axis + 1] == (dim,) else -1
        for axis, dim in enumerate(shape)
    ]
    spec = tape.ints(*sizes) if sizes.count(-1) <= 1 else tape.emit("Shape", target)
    return tape.emit("Reshape", value, spec)


def rows(tape: Tape, value: str) -> str:
    """See a value as a matrix of its last axis' rows."""
    shape = tape.shape(value)
    if len(shape) == MATRIX:
        return value
    source = _before_reshape(tape, value)
    before = tape.shapes.get(source, ())
    if len(before) == MATRIX and before[-1] == shape[-1]:
        return source
    return tape.emit("Flatten", value, axis=len(shape) - 1)


def _before_reshape(tape: Tape, value: str) -> str:
    reshaped = tape.producer(value, "Reshape")
    source: str = value if reshaped is None else reshaped.input[0]
    return source


def transpose(tape: Tape, value: str, perm: Sequence[int]) -> str:
    """Permute axes: two permutations become one, and a product is transposed by its factors."""
    if (inner := tape.producer(value, "Transpose")) is not None:
        inner_perm = permutation(inner, len(perm))
        return transpose(tape, inner.input[0], [inner_perm[axis] for axis in perm])
    perm = list(perm)
    if perm == sorted(perm):
        return value
    if perm == _swapped(len(perm)) and (product := _transposed_product(tape, value)):
        return product
    result = tape.emit("Transpose", value, perm=perm)
    if value in tape.shapes:
        tape.shapes[result] = tuple(tape.shapes[value][axis] for axis in perm)
    return result


def swap(tape: Tape, value: str) -> str:
    """Transpose the matrices that a value consists of."""
    return transpose(tape, value, _swapped(tape.rank(value)))


def permutation(node: NodeProto, rank: int) -> list[int]:
    """Read what a Transpose node does."""
    for attribute in node.attribute:
        return list(attribute.ints)
    return list(range(rank))[::-1]


def _transposed_product(tape: Tape, value: str) -> str | None:
    """Write (AB)^T as B^T A^T where AB is a gradient that nothing else needs."""
    if [*tape.gradients.values()].count(value) != 1:
        return None
    if (gemm := tape.producer(value, "Gemm")) is not None and not gemm.input[2:]:
        flags = attributes_of(gemm)
        first, second = (1 - flags.get("transB", 0), 1 - flags.get("transA", 0))
        flags = flags | {"transA": first, "transB": second}
        return tape.emit("Gemm", gemm.input[1], gemm.input[0], **flags)
    if (product := tape.producer(value, "MatMul")) is not None:
        ranks = {len(tape.shapes.get(name, ())) for name in product.input}
        if ranks == {tape.rank(value)}:
            left, right = (swap(tape, name) for name in product.input)
            return tape.emit("MatMul", right, left)
    return None


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Read a node's attributes."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _swapped(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]
