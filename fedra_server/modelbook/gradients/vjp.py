"""Reverse-mode differentiation: an ONNX graph's vector-Jacobian product as a graph of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnx import AttributeProto, ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from fedra_edge.protocol.graphs import GRADIENT
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.gradients.moves import MOVING
from fedra_server.modelbook.gradients.rules import ELEMENTWISE, MULTIPLYING
from fedra_server.modelbook.gradients.tape import Tape

RULES = {**ELEMENTWISE, **MOVING}
_MIN_OPSET = 18
_SUBGRAPHS = {AttributeProto.GRAPH, AttributeProto.GRAPHS}


def vjp_graph(forward: ModelProto, output: str, wrt: Mapping[str, str]) -> ModelProto:
    """Give the graph that pulls a gradient of one output back to some inputs.

    Its inputs are those of ``forward`` that are still needed, plus ``gradient``, shaped like
    ``output``. It computes again what it needs of the forward values, and nothing else.

    Args:
        forward: A graph of standard operators, opset 18 or later.
        output: The output that ``gradient`` belongs to.
        wrt: For each input to differentiate by, the name to give its gradient.

    Raises:
        ConfigurationError: An operator has no rule, or an input does not enter the output.
    """
    _check(forward, output, wrt)
    model = ModelProto()
    model.CopyFrom(forward)
    kept = [value for value in model.graph.output if value.name == output]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    tape = Tape(model, wrt)
    tape.shapes[GRADIENT] = tape.shape(output)
    tape.gradients[output] = GRADIENT
    for node in _needed(tape.forward, {output}):
        if any(attribute.type in _SUBGRAPHS for attribute in node.attribute):
            raise _no_rule(node, "it has a graph of its own inside")
        if tape.carrying.intersection(node.output) and any(map(tape.gradients.get, node.output)):
            _pull(tape, node)
    for name in wrt:
        if name not in tape.gradients:
            raise ConfigurationError(
                f"{output!r} does not depend on {name!r}",
                remedy="Leave it out, or train something that the output depends on.",
            )
    return _assemble(model, tape, wrt)


def _check(forward: ModelProto, output: str, wrt: Mapping[str, str]) -> None:
    versions = {opset.domain or "ai.onnx": opset.version for opset in forward.opset_import}
    if versions.get("ai.onnx", 0) < _MIN_OPSET:
        raise ConfigurationError(
            f"the graph is written for opset {versions.get('ai.onnx', 'none')}",
            remedy=f"Export the model for opset {_MIN_OPSET}.",
        )
    inputs = {value.name for value in forward.graph.input}
    outputs = {value.name for value in forward.graph.output}
    if missing := [*({*wrt} - inputs), *({output} - outputs)]:
        raise ConfigurationError(
            f"the graph has no {', '.join(map(repr, missing))}",
            remedy="Name inputs of the graph to differentiate by, and one of its outputs.",
        )
    names = {name for node in forward.graph.node for name in node.output} | inputs
    if taken := names & {GRADIENT, *wrt.values()}:
        raise ConfigurationError(
            f"names are taken in the graph: {', '.join(sorted(taken))}",
            remedy="Rename these values of the graph, or choose other names for gradients.",
        )


def _needed(nodes: Iterable[NodeProto], names: Iterable[str]) -> list[NodeProto]:
    """Give the nodes that some values depend on, the last one first."""
    wanted, found = set(names), []
    for node in reversed([*nodes]):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            found.append(node)
    return found


def _pull(tape: Tape, node: NodeProto) -> None:
    """Add a node's share to the gradients of its inputs."""
    rule = RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
    later = [name for name in node.output[1:] if name in tape.gradients]
    if rule is None or (later and node.op_type != "Split"):
        raise _no_rule(node, "there is no rule for it")
    for name in node.output:
        if name in tape.gradients and not _takes_thin(tape, node):
            tape.gradients[name] = _full(tape, name)
    contributions = rule(tape, node, tape.gradients.get(node.output[0], ""))
    given = [
        (name, contribution)
        for name, contribution in zip(node.input, contributions, strict=False)
        if contribution
    ]
    if missing := tape.carrying.intersection(node.input) - {name for name, _ in given}:
        raise _no_rule(node, f"the rule does not cover its input {', '.join(sorted(missing))}")
    for name, contribution in given:
        _accumulate(tape, name, contribution)


def _no_rule(node: NodeProto, reason: str) -> ConfigurationError:
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    named = f" ({node.name})" if node.name else ""
    return ConfigurationError(
        f"the operator {operator}{named} cannot be differentiated: {reason}",
        remedy=f"Rewrite the model without it, from these: {', '.join(sorted(RULES))}.",
    )


def _takes_thin(tape: Tape, node: NodeProto) -> bool:
    """Tell whether a gradient still to be broadcast gets its full size in the rule."""
    if node.op_type == "Mul":
        return all(tape.shapes.get(name) == tape.shape(node.output[0]) for name in node.input)
    return node.op_type in MULTIPLYING


def _full(tape: Tape, name: str) -> str:
    """Give the gradient of a value in the value's own shape."""
    gradient, shape = tape.gradients[name], tape.shape(name)
    if tape.shapes[gradient] == shape:
        return gradient
    expanded = tape.emit("Expand", gradient, tape.shape_vector(name))
    tape.shapes[expanded] = shape
    return expanded


def _accumulate(tape: Tape, name: str, contribution: str) -> None:
    shape = tape.shape(name)
    tape.shapes.setdefault(contribution, shape)
    known = tape.gradients.get(name)
    if known is None:
        tape.gradients[name] = contribution
        return
    if shape not in {tape.shapes[known], tape.shapes[contribution]}:
        known = tape.gradients[name] = _full(tape, name)
    total = _sum(tape, known, contribution)
    tape.shapes.setdefault(total, shape)
    tape.gradients[name] = total


def _sum(tape: Tape, first: str, second: str) -> str:
    """Add, or subtract what one of the two is the negative of."""
    for kept, other in ((first, second), (second, first)):
        if (negated := tape.producer(other, "Neg")) is not None:
            return tape.emit("Sub", kept, negated.input[0])
    return tape.emit("Add", first, second)


def _assemble(model: ModelProto, tape: Tape, wrt: Mapping[str, str]) -> ModelProto:
    results = {new: _full(tape, name) for name, new in wrt.items()}
    renamed: dict[str, str] = {}
    own = {name for node in tape.nodes[len(tape.forward) :] for name in node.output}
    for new, old in results.items():
        if old in own and old not in renamed:
            renamed[old] = new
        else:
            tape.nodes.append(helper.make_node("Identity", [old], [new]))
    for node in tape.nodes:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    nodes = _needed(tape.nodes, results)[::-1]
    used = {name for node in nodes for name in node.input}
    inputs = {value.name: value for value in model.graph.input}
    pulled = _like(next(iter(model.graph.output)), GRADIENT, tape)
    graph = helper.make_graph(
        nodes,
        f"{model.graph.name or 'graph'}_vjp",
        [*(value for name, value in inputs.items() if name in used), pulled],
        [_like(inputs[name], new, tape) for name, new in wrt.items()],
        [
            numpy_helper.from_array(value, name)
            for name, value in tape.constants.items()
            if name in used
        ],
    )
    result = helper.make_model(graph, opset_imports=model.opset_import, functions=model.functions)
    result.ir_version = model.ir_version
    return result


def _like(value: ValueInfoProto, name: str, tape: Tape) -> ValueInfoProto:
    return helper.make_tensor_value_info(
        name, value.type.tensor_type.elem_type, tape.shape(value.name)
    )
