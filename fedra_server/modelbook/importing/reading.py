"""Reads an ONNX file into a flat graph: one opset, constants and weights apart, no aliases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx.checker
from numpy.typing import NDArray
from onnx import helper, inliner, numpy_helper, version_converter

from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.graphs.writing import OPSET
from fedra_server.modelbook.importing.naming import is_anonymous

OLDEST_OPSET: Final = 13
_STANDARD: Final = frozenset({"", "ai.onnx"})
_CONTROL: Final = frozenset({"If", "Loop", "Scan", "SequenceConstruct"})
_EXPORT_AGAIN: Final = (
    "Export the model for inference, in float32, without optimizations, with opset 18."
)
_OTHER_PATH: Final = (
    "Give the path of a file that can be read, with the files of its weights beside it."
)
Array = NDArray[Any]


@dataclass(frozen=True)
class FlatGraph:
    """A graph as nodes in the order they can run in.

    ``weights`` may differ from block to block; ``constants`` are part of the structure.
    """

    nodes: tuple[onnx.NodeProto, ...]
    weights: dict[str, Array]
    constants: dict[str, Array]
    inputs: tuple[onnx.ValueInfoProto, ...]
    output: str

    @property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that makes each value."""
        return {name: node for node in self.nodes for name in node.output}


def read_graph(path: Path) -> FlatGraph:
    """Read a model and bring it to the operators of one opset.

    Raises:
        ConfigurationError: It is no ONNX model, or one whose operators cannot be taken over.
    """
    try:
        model = onnx.load(path)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error}", remedy=_OTHER_PATH) from error
    except Exception as error:  # of protobuf, or of weights that are kept in a file beside it
        raise ConfigurationError(f"cannot read {path}: {error}", remedy=_EXPORT_AGAIN) from error
    if not model.graph.node:
        raise ConfigurationError(f"{path} holds no ONNX model", remedy=_EXPORT_AGAIN)
    with _refusing(path):
        model = _at_one_opset(inliner.inline_local_functions(model) if model.functions else model)
        graph = model.graph
        constants = {it.name: numpy_helper.to_array(it) for it in graph.initializer}
    named = [name for name, array in constants.items() if _is_weight(name, array)]
    weights = {name: constants.pop(name) for name in named}
    flat = FlatGraph(
        nodes=tuple(graph.node),
        weights=weights,
        constants=constants,
        inputs=tuple(it for it in graph.input if it.name not in weights | constants),
        output=_logits_of(graph),
    )
    return pruned(_without_aliases(_without_gelu(flat)))


def pruned(graph: FlatGraph) -> FlatGraph:
    """Leave out nodes and values that the output does not need."""
    needed, kept = {graph.output}, []
    for node in reversed(graph.nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    return replace(
        graph,
        nodes=tuple(reversed(kept)),
        weights={name: it for name, it in graph.weights.items() if name in needed},
        constants={name: it for name, it in graph.constants.items() if name in needed},
    )


def renamed(nodes: Iterable[onnx.NodeProto], names: dict[str, str]) -> Iterator[onnx.NodeProto]:
    """Copy nodes with other names for what goes in and comes out."""
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [names.get(name, name) for name in node.input]
        copy.output[:] = [names.get(name, name) for name in node.output]
        yield copy


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Give a node's attributes by name."""
    return {it.name: helper.get_attribute_value(it) for it in node.attribute}


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what the library says of an invalid model into a refusal."""
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:  # the library raises many kinds
        raise ConfigurationError(
            f"{path} is no valid ONNX model: {error}", remedy=_EXPORT_AGAIN
        ) from error


def _at_one_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Lower or raise the opset, after making sure that there is nothing but standard operators."""
    for node in model.graph.node:
        if node.domain not in _STANDARD or node.op_type in _CONTROL:
            raise _unsupported(node)
    _check(model)
    version = next((it.version for it in model.opset_import if it.domain in _STANDARD), 0)
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= version <= newest:
        raise ConfigurationError(
            f"opset {version} is not supported; {OLDEST_OPSET} to {newest} are",
            remedy=_EXPORT_AGAIN,
        )
    if version < OPSET:
        return version_converter.convert_version(model, OPSET)
    for node in model.graph.node:
        if not _exists(node):
            raise _unsupported(node)
        if node.op_type == "Cast":  # later opsets say how to round to 8 bits, which does not occur
            kept = [it for it in node.attribute if it.name != "saturate"]
            del node.attribute[:]
            node.attribute.extend(kept)
    return model


def _check(model: onnx.ModelProto) -> None:
    """Make sure that the model is valid, and that its weights and output are where we look."""
    onnx.checker.check_model(model)
    graph = model.graph
    if graph.sparse_initializer:
        raise ConfigurationError("the model has sparse weights", remedy=_EXPORT_AGAIN)
    made = {name for node in graph.node for name in node.output}
    if not graph.output or _logits_of(graph) not in made:
        raise ConfigurationError("no operator makes the model's output", remedy=_EXPORT_AGAIN)


def _exists(node: onnx.NodeProto) -> bool:
    """Tell whether our opset has an operator with these attributes; Gelu is rewritten."""
    if node.op_type == "Gelu":
        return True
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET)
    except onnx.defs.SchemaError:
        return False
    known = {*schema.attributes, "saturate"}
    return all(it.name in known for it in node.attribute)


def _unsupported(node: onnx.NodeProto) -> ConfigurationError:
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return ConfigurationError(f"operator {name} is not supported", remedy=_EXPORT_AGAIN)


def _is_weight(name: str, array: Array) -> bool:
    """Tell whether a tensor may differ from block to block; single numbers do if they are named."""
    if array.dtype in (np.float16, np.float64) or array.dtype.name == "bfloat16":
        if array.ndim:
            raise ConfigurationError(
                f"the model has weights in {array.dtype}", remedy=_EXPORT_AGAIN
            )
        return False
    is_single = array.ndim == 0 or (array.size == 1 and is_anonymous(name))
    return array.dtype == np.float32 and not is_single


def _logits_of(graph: onnx.GraphProto) -> str:
    names = [it.name for it in graph.output]
    return "logits" if "logits" in names else names[0]


def _without_gelu(graph: FlatGraph) -> FlatGraph:
    """Write Gelu, which our opset lacks, out as its formula (arXiv 1606.08415)."""
    nodes: list[onnx.NodeProto] = []
    used = {
        "fedra_half": 0.5, "fedra_one": 1.0, "fedra_root": math.sqrt(2.0),
        "fedra_cube": 0.044715, "fedra_scale": math.sqrt(2.0 / math.pi),
    }  # fmt: skip
    for node in graph.nodes:
        nodes += _gelu(node) if node.op_type == "Gelu" else [node]
    scalars = {name: np.array(value, np.float32) for name, value in used.items()}
    return replace(graph, nodes=tuple(nodes), constants=graph.constants | scalars)


def _gelu(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    (states,), (out,) = node.input, node.output
    if attributes_of(node).get("approximate", b"none") == b"tanh":
        steps = [
            ("Mul", states, states, "square"),
            ("Mul", f"{out}/square", "fedra_cube", "cubic"),
            ("Add", f"{out}/cubic", "fedra_one", "factor"),
            ("Mul", states, f"{out}/factor", "bent"),
            ("Mul", f"{out}/bent", "fedra_scale", "inner"),
        ]
        curve = "Tanh"
    else:
        steps, curve = [("Div", states, "fedra_root", "inner")], "Erf"
    nodes = [helper.make_node(op, [a, b], [f"{out}/{to}"]) for op, a, b, to in steps]
    return [
        *nodes,
        helper.make_node(curve, [f"{out}/inner"], [f"{out}/curve"]),
        helper.make_node("Add", [f"{out}/curve", "fedra_one"], [f"{out}/gate"]),
        helper.make_node("Mul", [states, f"{out}/gate"], [f"{out}/gated"]),
        helper.make_node("Mul", [f"{out}/gated", "fedra_half"], [out]),
    ]


def _without_aliases(graph: FlatGraph) -> FlatGraph:
    """Take Constant, Identity and Dropout nodes out; a weight keeps the name of its alias."""
    same: dict[str, str] = {}
    weights, constants = {**graph.weights}, {**graph.constants}
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        source = same.get(node.input[0], node.input[0]) if node.input else ""
        if node.op_type == "Constant":
            constants[node.output[0]] = _constant_of(node)
        elif node.op_type == "Identity" and source in weights:
            weights[node.output[0]] = weights[source]
        elif node.op_type == "Identity" or _is_idle_dropout(node, constants):
            same[node.output[0]] = source
        else:
            nodes += renamed([node], same)
    output = same.get(graph.output, graph.output)
    return replace(graph, nodes=tuple(nodes), weights=weights, constants=constants, output=output)


def _constant_of(node: onnx.NodeProto) -> Array:
    found = attributes_of(node)
    match [*found]:
        case ["value"]:
            return numpy_helper.to_array(found["value"])
        case ["value_float" | "value_floats" as kind]:
            return np.array(found[kind], np.float32)
        case ["value_int" | "value_ints" as kind]:
            return np.array(found[kind], np.int64)
        case kinds:
            raise ConfigurationError(
                f"a constant with {' and '.join(kinds) or 'no value'} is not supported",
                remedy=_EXPORT_AGAIN,
            )


def _is_idle_dropout(node: onnx.NodeProto, constants: dict[str, Array]) -> bool:
    if node.op_type != "Dropout":
        return False
    if len(node.input) > 2 and constants.get(node.input[2], np.ones(1)).any():  # noqa: PLR2004 (x, ratio, training_mode)
        raise ConfigurationError(
            "the model was exported for training, with Dropout at work",
            remedy="Call .eval() on the model before exporting it.",
        )
    return True
