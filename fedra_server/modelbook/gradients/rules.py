"""The gradient rules of elementwise operators, and of those that reduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import pi, prod, sqrt
from typing import Final

from onnx import NodeProto

from fedra_server.modelbook.gradients.forms import attributes_of, reduce_to
from fedra_server.modelbook.gradients.tape import Tape

# From a node and the gradient of its first output to those of its inputs; None where none flows.
Rule = Callable[[Tape, NodeProto, str], Sequence[str | None]]
_SQUARE: Final = 2.0
# The same for one input x and output y: (tape, x, y, gradient of y) -> gradient of x.
_Unary = Callable[[Tape, str, str, str], str]


def _add(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    shape = tape.shape(node.output[0])
    return [
        reduce_to(tape, gradient, shape, name) if name in tape.carrying else None
        for name in node.input
    ]


def _sub(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    left, right = _add(tape, node, gradient)
    return [left, right and tape.emit("Neg", right)]


def _mul(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    left, right = node.input
    if left == right:
        return [tape.emit("Mul", _scaled(tape, gradient, 2.0, left), left)]
    shape = tape.shape(node.output[0])
    return [
        reduce_to(tape, _times(tape, gradient, other), shape, name)
        if name in tape.carrying
        else None
        for name, other in ((left, right), (right, left))
    ]


def _div(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    above, below = node.input
    shape = tape.shape(node.output[0])
    results: list[str | None] = [None, None]
    if above in tape.carrying:
        divided = (
            _scaled(tape, gradient, 1 / number, above)
            if (number := tape.number(below))
            else tape.emit("Div", gradient, below)
        )
        results[0] = reduce_to(tape, divided, shape, above)
    if below in tape.carrying:
        summed = reduce_to(tape, tape.emit("Mul", gradient, node.output[0]), shape, below)
        results[1] = tape.emit("Neg", tape.emit("Div", summed, below))
    return results


def _pow(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    base = node.input[0]
    exponent = tape.known(node, 1)
    if exponent is None or exponent.size != 1:
        return []
    power = float(exponent.item())
    scaled = _scaled(tape, gradient, power, base)
    lower = base if power == _SQUARE else tape.emit("Pow", base, tape.scalar(power - 1, base))
    return [tape.emit("Mul", scaled, lower)]


def _where(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    condition, chosen, other = node.input
    return [None, *_choose(tape, condition, gradient, (chosen, other), node.output[0])]


def _extreme(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    first, *others = node.input
    if len(others) != 1:
        return []
    taken = tape.emit("Equal", node.output[0], first)
    return _choose(tape, taken, gradient, (first, others[0]), node.output[0])


def _choose(
    tape: Tape, condition: str, gradient: str, names: tuple[str, str], output: str
) -> list[str | None]:
    """Give the gradient to the first where a condition holds, elsewhere to the second."""
    zero = tape.scalar(0.0, output)
    branches = ((condition, gradient, zero), (condition, zero, gradient))
    return [
        reduce_to(tape, tape.emit("Where", *branch), tape.shape(output), name)
        if name in tape.carrying
        else None
        for name, branch in zip(names, branches, strict=True)
    ]


def _reduce(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    """Spread a sum or mean back: left thin, so that the next operator broadcasts it."""
    name, attributes = node.input[0], attributes_of(node)
    shape = tape.shape(name)
    constant = tape.known(node, 1)
    axes = attributes.get("axes", []) if constant is None else constant.tolist()
    if not axes and attributes.get("noop_with_empty_axes", 0):
        return [gradient]
    axes = sorted(axis % len(shape) for axis in axes or range(len(shape)))
    if not attributes.get("keepdims", 1):
        gradient = tape.emit("Unsqueeze", gradient, tape.ints(*axes))
    if node.op_type == "ReduceMean":
        gradient = tape.emit("Div", gradient, _count(tape, name, axes))
    tape.shapes[gradient] = tuple(1 if axis in axes else dim for axis, dim in enumerate(shape))
    return [gradient]


def _count(tape: Tape, name: str, axes: Sequence[int]) -> str:
    """Give the number of elements along some axes."""
    sizes = [tape.shape(name)[axis] for axis in axes]
    if all(isinstance(size, int) for size in sizes):
        return tape.scalar(prod(int(size) for size in sizes), name)
    chosen = tape.emit("Gather", tape.emit("Shape", name), tape.ints(*axes))
    return tape.emit("Cast", tape.emit("ReduceProd", chosen, keepdims=0), to=tape.type_of(name))


def _softmax(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    result = node.output[0]
    axis = tape.ints(attributes_of(node).get("axis", -1))
    weighted = tape.emit("Mul", gradient, result)
    mean = tape.emit("ReduceSum", weighted, axis, keepdims=1)
    return [tape.emit("Mul", result, tape.emit("Sub", gradient, mean))]


def _log_softmax(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    axis = tape.ints(attributes_of(node).get("axis", -1))
    total = tape.emit("ReduceSum", gradient, axis, keepdims=1)
    share = tape.emit("Mul", tape.emit("Exp", node.output[0]), total)
    return [tape.emit("Sub", gradient, share)]


def _layer_normalization(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    """D x = (s - mean(s) - z mean(s z)) / deviation, with s = gradient * scale, z normalized."""
    name, scale = node.input[:2]
    rank = tape.rank(name)
    first = attributes_of(node).get("axis", -1) % rank
    axes, before = tape.ints(*range(first, rank)), tape.ints(*range(first))
    mean, inverse = tape.name_outputs(node, 3)[1:]
    centred = tape.emit("Sub", name, mean)
    results: list[str | None] = [None] * len(node.input)
    if name in tape.carrying:
        scaled = tape.emit("Mul", gradient, scale)
        along = tape.emit("ReduceMean", tape.emit("Mul", scaled, centred), axes, keepdims=1)
        along = tape.emit("Mul", along, tape.emit("Mul", inverse, inverse))
        rest = tape.emit("Sub", scaled, tape.emit("Mul", centred, along))
        rest = tape.emit("Sub", rest, tape.emit("ReduceMean", scaled, axes, keepdims=1))
        results[0] = tape.emit("Mul", rest, inverse)
    if scale in tape.carrying:
        normalized = tape.emit("Mul", centred, inverse)
        product = tape.emit("Mul", gradient, normalized)
        results[1] = tape.emit("ReduceSum", product, before, keepdims=0)
    if tape.carrying.intersection(node.input[2:]):
        results[2] = tape.emit("ReduceSum", gradient, before, keepdims=0)
    return results


def _times(tape: Tape, gradient: str, factor: str) -> str:
    """Multiply, with a sign left to the end, where a sum becomes a difference."""
    if (number := tape.number(factor)) is not None:
        return _scaled(tape, gradient, number, factor)
    if (negated := tape.producer(gradient, "Neg")) is not None:
        return tape.emit("Neg", tape.emit("Mul", negated.input[0], factor))
    return tape.emit("Mul", gradient, factor)


def _scaled(tape: Tape, gradient: str, factor: float, like: str) -> str:
    """Multiply by a number, together with one that was multiplied by before."""
    before = tape.producer(gradient, "Mul")
    if before is not None and (number := tape.number(before.input[1])) is not None:
        return _scaled(tape, before.input[0], number * factor, like)
    return gradient if factor == 1 else tape.emit("Mul", gradient, tape.scalar(factor, like))


def _erf(tape: Tape, x: str, _: str, gradient: str) -> str:
    """Divide by exp(x^2), which needs only z where x = z / sqrt(2), as in GELU."""
    source, factor = _unscaled(tape, x)
    square = _scaled(tape, tape.emit("Mul", source, source), factor**2, x)
    return _scaled(tape, tape.emit("Div", gradient, tape.emit("Exp", square)), 2 / sqrt(pi), x)


def _unscaled(tape: Tape, x: str) -> tuple[str, float]:
    """See a value as another one times a number."""
    for op_type, power in (("Div", -1), ("Mul", 1)):
        node = tape.producer(x, op_type)
        if node is not None and (number := tape.number(node.input[1])):
            return node.input[0], number**power
    return x, 1.0


def _tanh(tape: Tape, x: str, y: str, gradient: str) -> str:
    slope = tape.emit("Sub", tape.scalar(1.0, x), tape.emit("Mul", y, y))
    return tape.emit("Mul", gradient, slope)


def _sigmoid(tape: Tape, x: str, y: str, gradient: str) -> str:
    slope = tape.emit("Mul", y, tape.emit("Sub", tape.scalar(1.0, x), y))
    return tape.emit("Mul", gradient, slope)


def _sqrt(tape: Tape, x: str, y: str, gradient: str) -> str:
    return tape.emit("Div", _scaled(tape, gradient, 0.5, x), y)


def _reciprocal(tape: Tape, _: str, y: str, gradient: str) -> str:
    return tape.emit("Neg", tape.emit("Mul", gradient, tape.emit("Mul", y, y)))


def _clip(tape: Tape, x: str, y: str, gradient: str) -> str:
    return tape.emit("Where", tape.emit("Equal", x, y), gradient, tape.scalar(0.0, x))


def _relu(tape: Tape, x: str, y: str, gradient: str) -> str:
    positive = tape.emit("Greater", y, tape.scalar(0.0, x))
    return tape.emit("Where", positive, gradient, tape.scalar(0.0, x))


def _leaky_relu(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    x = node.input[0]
    slope = attributes_of(node).get("alpha", 0.01)
    positive = tape.emit("Greater", x, tape.scalar(0.0, x))
    return [tape.emit("Where", positive, gradient, _scaled(tape, gradient, slope, x))]


def _hard_sigmoid(tape: Tape, node: NodeProto, gradient: str) -> list[str | None]:
    x, y = node.input[0], node.output[0]
    slope = attributes_of(node).get("alpha", 0.2)
    above = tape.emit("Greater", y, tape.scalar(0.0, x))
    inside = tape.emit("And", above, tape.emit("Less", y, tape.scalar(1.0, x)))
    return [tape.emit("Where", inside, _scaled(tape, gradient, slope, x), tape.scalar(0.0, x))]


def _cast(tape: Tape, x: str, _: str, gradient: str) -> str:
    return tape.emit("Cast", gradient, to=tape.type_of(x))


def _unary(pull: _Unary) -> Rule:
    return lambda tape, node, gradient: [pull(tape, node.input[0], node.output[0], gradient)]


_UNARY: Final[Mapping[str, _Unary]] = {
    "Abs": lambda tape, x, _, g: tape.emit("Mul", g, tape.emit("Sign", x)),
    "Cast": _cast,
    "Clip": _clip,
    "Cos": lambda tape, x, _, g: tape.emit("Neg", tape.emit("Mul", g, tape.emit("Sin", x))),
    "Erf": _erf,
    "Exp": lambda tape, _, y, g: tape.emit("Mul", g, y),
    "Identity": lambda _tape, _x, _y, g: g,
    "Log": lambda tape, x, _, g: tape.emit("Div", g, x),
    "Neg": lambda tape, _x, _y, g: tape.emit("Neg", g),
    "Reciprocal": _reciprocal,
    "Relu": _relu,
    "Sigmoid": _sigmoid,
    "Sin": lambda tape, x, _, g: tape.emit("Mul", g, tape.emit("Cos", x)),
    "Softplus": lambda tape, x, _, g: tape.emit("Mul", g, tape.emit("Sigmoid", x)),
    "Sqrt": _sqrt,
    "Tanh": _tanh,
}
# Operators whose rule multiplies by a value of full size, so that a thin gradient will do.
MULTIPLYING: Final = frozenset(
    {"Abs", "Cos", "Erf", "Exp", "Log", "Pow", "Reciprocal", "Sigmoid", "Sin", "Sqrt", "Tanh"}
)
ELEMENTWISE: Final[Mapping[str, Rule]] = {
    **{name: _unary(pull) for name, pull in _UNARY.items()},
    "Add": _add,
    "Div": _div,
    "HardSigmoid": _hard_sigmoid,
    "LayerNormalization": _layer_normalization,
    "LeakyRelu": _leaky_relu,
    "LogSoftmax": _log_softmax,
    "Max": _extreme,
    "Min": _extreme,
    "Mul": _mul,
    "Pow": _pow,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "Softmax": _softmax,
    "Sub": _sub,
    "Sum": _add,
    "Where": _where,
}
