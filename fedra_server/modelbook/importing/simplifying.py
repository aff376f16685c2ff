"""Simplifies a graph until equal blocks look equal: one input, plain shapes, nothing twice."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from fedra_edge.protocol.graphs import INPUTS
from fedra_edge.protocol.models import ModelInput, TokenInput
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.importing.probing import Extent, Probes, probe
from fedra_server.modelbook.importing.reading import (
    Array,
    FlatGraph,
    attributes_of,
    pruned,
    renamed,
)

NUM_EXAMPLES: Final = "fedra/examples"
NUM_TOKENS: Final = "fedra/tokens"
"""The two sizes of a batch as rows of one integer, each piece's from its own input."""

_IDS: Final = "input_ids"
_MASK: Final = "attention_mask"
_TYPES: Final = "token_type_ids"
_TEXT_INPUTS: Final = frozenset({_IDS, _MASK, _TYPES})


def simplify(graph: FlatGraph, wanted: ModelInput) -> tuple[FlatGraph, Probes]:
    """Bring a graph into a plain form, and tell the shapes of all its values.

    Raises:
        ConfigurationError: Its inputs are not what we can give, or it cannot be run.
    """
    single = _with_token_input(graph) if isinstance(wanted, TokenInput) else _with_images(graph)
    probes = probe(single, wanted)
    plain = _without_guards(_with_plain_shapes(single, probes), probes)
    plain = _with_transposes_in_turn(_without_detours(plain, probes))
    plain = _without_repeats(pruned(plain))
    return plain, probe(plain, wanted)


def _with_images(graph: FlatGraph) -> FlatGraph:
    if len(graph.inputs) != 1:
        raise _wrong_inputs(graph, "one input of images")
    (original,) = graph.inputs
    given = onnx.ValueInfoProto()
    given.CopyFrom(original)
    given.name = INPUTS
    nodes = tuple(renamed(graph.nodes, {original.name: INPUTS}))
    return replace(graph, nodes=nodes, inputs=(given,))


def _with_token_input(graph: FlatGraph) -> FlatGraph:
    """Make what the model takes of a batch of texts, which ends in negative numbers."""
    types = {it.name: it.type.tensor_type.elem_type for it in graph.inputs}
    if not {_IDS, _MASK} <= types.keys() or not types.keys() <= _TEXT_INPUTS:
        raise _wrong_inputs(graph, f"{_IDS}, {_MASK} and perhaps {_TYPES}")
    nodes = [
        helper.make_node("Max", [INPUTS, "fedra/zero"], ["fedra/ids"]),
        helper.make_node("Cast", ["fedra/ids"], [_IDS], to=types[_IDS]),
        helper.make_node("GreaterOrEqual", [INPUTS, "fedra/zero"], ["fedra/real"]),
        helper.make_node("Cast", ["fedra/real"], [_MASK], to=types[_MASK]),
        helper.make_node("Shape", [INPUTS], ["fedra/shape"]),
        helper.make_node("Expand", ["fedra/zero", "fedra/shape"], ["fedra/types"]),
        helper.make_node(
            "Cast", ["fedra/types"], [_TYPES], to=types.get(_TYPES, TensorProto.INT64)
        ),
    ]
    given = helper.make_tensor_value_info(INPUTS, TensorProto.INT64, ["n", "t"])
    zero = {"fedra/zero": np.array(0, np.int64)}
    constants = graph.constants | zero
    return pruned(
        replace(graph, nodes=(*nodes, *graph.nodes), inputs=(given,), constants=constants)
    )


def _wrong_inputs(graph: FlatGraph, expected: str) -> ConfigurationError:
    names = ", ".join(it.name for it in graph.inputs)
    return ConfigurationError(
        f"the model takes {names or 'nothing'}; a model of this kind of data takes {expected}",
        remedy="Give the right --data-kind, and export the model with these inputs.",
    )


class _Sizes:
    """Writes sizes that depend on the batch in one way only, before everything else."""

    def __init__(self) -> None:
        self.constants: dict[str, Array] = {}
        self.nodes: dict[str, onnx.NodeProto] = {}

    def row(self, extents: tuple[Extent, ...]) -> str:
        """Give a row of integers with these sizes."""
        if all(it.is_static for it in extents):
            return self._row_of([it.factor for it in extents])
        parts = [self._part(it) for it in extents]
        if len(parts) == 1:
            return parts[0]
        return self._node("Concat", parts, f"fedra/row{[it.dim for it in extents]}", axis=0)

    def scalar(self, extent: Extent) -> str:
        """Give a single size."""
        name = f"fedra/size{extent.dim}"
        return self._node("Squeeze", [self.row((extent,)), self._row_of([0])], name)

    def _part(self, extent: Extent) -> str:
        if extent.is_static:
            return self._row_of([extent.factor])
        name = ""
        for is_part, size, axis in (
            (extent.of_batch, NUM_EXAMPLES, 0),
            (extent.of_tokens, NUM_TOKENS, 1),
        ):
            if is_part:
                own = self._node("Shape", [INPUTS], size, start=axis, end=axis + 1)
                name = self._node("Mul", [name, own], "fedra/product") if name else own
        if extent.factor != 1:
            factor = self._row_of([extent.factor])
            name = self._node("Mul", [name, factor], f"{name}*{extent.factor}")
        if extent.offset:
            name = self._node("Add", [name, self._row_of([extent.offset])], f"fedra/{extent.dim}")
        return name

    def _row_of(self, values: list[int]) -> str:
        name = f"fedra/ints{values}"
        self.constants[name] = np.array(values, np.int64)
        return name

    def _node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:  # noqa: ANN401 (of any operator)
        self.nodes.setdefault(name, helper.make_node(operator, inputs, [name], **attributes))
        return name


def _with_plain_shapes(graph: FlatGraph, probes: Probes) -> FlatGraph:
    """Replace every computed shape by constants and by the two sizes of a batch."""
    sizes, same = _Sizes(), dict[str, str]()
    weights, constants = {**graph.weights}, {**graph.constants}
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        for name in node.output:
            first, second = probes.values.get(name, (np.empty(0), np.empty(1)))
            extents = probes.sizes_in(name)
            if first.shape == second.shape and np.array_equal(first, second, equal_nan=False):
                is_weight = first.dtype == np.float32 and first.size > 1
                (weights if is_weight else constants)[name] = first
            elif extents is not None:
                same[name] = sizes.row(extents) if first.ndim else sizes.scalar(extents[0])
        known = constants.keys() | weights.keys() | same.keys()
        if not known.issuperset(node.output):
            nodes += renamed([_plain_reshape(node, probes, sizes)], same)
    return replace(
        graph,
        nodes=(*sizes.nodes.values(), *nodes),
        weights=weights,
        constants=constants | sizes.constants,
    )


def _plain_reshape(node: onnx.NodeProto, probes: Probes, sizes: _Sizes) -> onnx.NodeProto:
    """Write the shape of a Reshape as a constant where at most one size is open in it."""
    before, after = probes.shapes.get(node.input[0]), probes.shapes.get(node.output[0])
    if node.op_type != "Reshape" or before is None or after is None:
        return node
    kept = [
        it.factor if it.is_static else 0 if before[axis : axis + 1] == (it,) else -1
        for axis, it in enumerate(after)
    ]
    is_plain = kept.count(-1) <= 1
    row = sizes.row(tuple(Extent(size) for size in kept) if is_plain else after)
    return helper.make_node("Reshape", [node.input[0], row], list(node.output), node.name)


def _without_guards(graph: FlatGraph, probes: Probes) -> FlatGraph:
    """Take out an empty mask that is added, and a guard against rows that a mask leaves empty."""
    same: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    producers = graph.producers
    for node in graph.nodes:
        copy = next(renamed([node], same))
        nodes.append(copy)
        if node.op_type == "Add":
            for empty, other in (tuple(copy.input), tuple(copy.input)[::-1]):
                values = probes.values.get(empty, (np.ones(1), np.ones(1)))
                keeps_shape = probes.shapes.get(other) == probes.shapes.get(node.output[0])
                if keeps_shape and not any(value.any() for value in values):
                    same[node.output[0]] = other
        elif node.op_type == "Where" and (guarded := _guarded(copy, producers, same)):
            same[node.output[0]] = guarded
    return replace(graph, nodes=tuple(nodes), output=same.get(graph.output, graph.output))


def _guarded(
    where: onnx.NodeProto, producers: dict[str, onnx.NodeProto], same: dict[str, str]
) -> str | None:
    """Give y of Where(IsNaN(y), c, y) if y is the Softmax of a bare product, which is no NaN."""
    asked, kept = producers.get(where.input[0]), where.input[2]
    softmax = producers.get(kept)
    if asked is None or asked.op_type != "IsNaN" or asked.input[0] != kept or softmax is None:
        return None
    scores = producers.get(same.get(softmax.input[0], softmax.input[0]))
    is_bare = softmax.op_type == "Softmax" and scores is not None and scores.op_type == "MatMul"
    return kept if is_bare else None


def _without_detours(graph: FlatGraph, probes: Probes) -> FlatGraph:
    """Permute axes where they are, rather than with the ones before them joined for a while."""
    producers, nodes = graph.producers, []
    for node in graph.nodes:
        perm, source = _direct_permutation(node, producers, probes)
        nodes.append(
            helper.make_node("Transpose", [source], list(node.output), node.name, perm=perm)
            if perm
            else node
        )
    return replace(graph, nodes=tuple(nodes))


def _direct_permutation(
    split: onnx.NodeProto, producers: dict[str, onnx.NodeProto], probes: Probes
) -> tuple[list[int], str]:
    """Find what a Reshape, Transpose and Reshape do together if that is only to permute axes."""
    turn = producers.get(split.input[0]) if split.op_type == "Reshape" else None
    join = producers.get(turn.input[0]) if turn and turn.op_type == "Transpose" else None
    if turn is None or join is None or join.op_type != "Reshape":
        return [], ""
    perm = attributes_of(turn).get("perm")
    if not perm:
        return [], ""
    first, joined, last = (
        probes.shapes.get(name, ()) for name in (join.input[0], join.output[0], split.output[0])
    )
    kept = len(perm) - 1
    leading = len(first) - kept
    turned = tuple(joined[axis] for axis in perm[1:])
    if perm[0] or leading < 1 or first[leading:] != joined[1:] or last != first[:leading] + turned:
        return [], ""
    return [*range(leading), *(axis - 1 + leading for axis in perm[1:])], join.input[0]


def _with_transposes_in_turn(graph: FlatGraph) -> FlatGraph:
    """Write every further Transpose of a value as one of its first Transpose.

    An exporter that joins the first block's Transpose with one before it is undone by that.
    """
    first: dict[str, onnx.NodeProto] = {}
    nodes = []
    for node in graph.nodes:
        is_told = node.op_type == "Transpose" and "perm" in attributes_of(node)
        before = first.setdefault(node.input[0], node) if is_told else node
        if before is not node:
            done, wanted = attributes_of(before)["perm"], attributes_of(node)["perm"]
            perm = [done.index(axis) for axis in wanted]
            inputs, outputs = list(before.output), list(node.output)
            nodes.append(helper.make_node("Transpose", inputs, outputs, node.name, perm=perm))
        else:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _without_repeats(graph: FlatGraph) -> FlatGraph:
    """Keep one of all constants that are equal, and one of all nodes that do the same."""
    same: dict[str, str] = {}
    constants: dict[str, Array] = {}
    for name, array in graph.constants.items():
        content = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        same[name] = f"fedra/{array.dtype}{list(array.shape)}{content}"
        constants[same[name]] = array
    known: dict[tuple[object, ...], onnx.NodeProto] = {}
    nodes = []
    for node in renamed(graph.nodes, same):
        node.input[:] = [same.get(name, name) for name in node.input]
        attributes = sorted(it.SerializeToString(deterministic=True) for it in node.attribute)
        key = (node.op_type, *node.input, *attributes)
        if (twin := known.setdefault(key, node)) is node:
            nodes.append(node)
        else:
            same |= zip(node.output, twin.output, strict=False)
    output = same.get(graph.output, graph.output)
    return pruned(replace(graph, nodes=tuple(nodes), constants=constants, output=output))
