"""Runs a graph at two batch sizes to learn what inside it depends on the batch, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

from fedra_edge.protocol.graphs import INPUTS
from fedra_edge.protocol.models import ModelInput, TokenInput
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.graphs.parts import BATCH, TOKENS
from fedra_server.modelbook.graphs.running import run_graph
from fedra_server.modelbook.graphs.writing import IR_VERSION, OPSET, Dim
from fedra_server.modelbook.importing.reading import Array, FlatGraph

_BATCHES: Final = (2, 3)
_LONGEST: Final = 12
_STEP: Final = 5
MIN_TOKENS: Final = _STEP + 1
_MAX_SIZES: Final = 16
_ANY_SIZE: Final = (
    "Export the model with a dynamic batch axis; give --image-size if it takes another size."
)
_SHAPES_ONLY: Final = frozenset({"Shape", "Size"})
"""Operators whose result tells nothing of the values that go in."""


class Extent(NamedTuple):
    """A size: factor * examples * tokens + offset, with the two where the flags say so."""

    factor: int
    of_batch: bool = False
    of_tokens: bool = False
    offset: int = 0

    @property
    def is_static(self) -> bool:
        """Whether the size is always the same."""
        return not (self.of_batch or self.of_tokens)

    @property
    def dim(self) -> Dim:
        """The size, or a name for it."""
        if self.is_static:
            return self.factor
        named = (BATCH if self.of_batch else "") + (TOKENS if self.of_tokens else "")
        factor = "" if self.factor == 1 else f"{self.factor}"
        return factor + named + (f"{self.offset:+d}" if self.offset else "")

    def size(self, examples: int, tokens: int) -> int:
        """Give the size for a batch."""
        varying = (examples if self.of_batch else 1) * (tokens if self.of_tokens else 1)
        return self.factor * varying + self.offset


@dataclass(frozen=True)
class Probes:
    """What two runs showed: shapes of all values, and the values that no example decides."""

    shapes: Mapping[str, tuple[Extent, ...]]
    types: Mapping[str, int]
    values: Mapping[str, tuple[Array, Array]]
    lengths: tuple[int, int]

    def sizes_in(self, name: str) -> tuple[Extent, ...] | None:
        """Read integers as sizes, if that is what they can be."""
        first, second = self.values.get(name, (None, None))
        if first is None or second is None or first.shape != second.shape:
            return None
        if first.dtype != np.int64 or first.ndim > 1 or first.size > _MAX_SIZES:
            return None
        return _extents(first.ravel().tolist(), second.ravel().tolist(), self.lengths)


def probe(graph: FlatGraph, wanted: ModelInput) -> Probes:
    """Run a graph on two random batches of different sizes.

    Raises:
        ConfigurationError: It cannot be run, or takes batches of one size only.
    """
    kinds = kinds_of(graph)
    told = [name for node in graph.nodes for name in node.output if name]
    asked = [name for name in told if kinds[name] <= {"shape"}]
    nodes = []
    for node in graph.nodes:
        shaped = (helper.make_node("Shape", [it], [f"{it}/shape"]) for it in node.output if it)
        nodes += [node, *shaped]
    model = assemble(graph, nodes, [*asked, *(f"{it}/shape" for it in told)])
    length = min(_LONGEST, wanted.max_tokens) if isinstance(wanted, TokenInput) else _LONGEST
    lengths = (length - _STEP, length)
    try:
        first, second = (
            run_graph(model, {INPUTS: random_inputs(wanted, *sizes), **graph.weights})
            for sizes in zip(_BATCHES, lengths, strict=True)
        )
    except ConfigurationError as error:
        error.remedy = error.remedy or _ANY_SIZE
        raise
    shapes = {
        name: _extents(first[f"{name}/shape"].tolist(), second[f"{name}/shape"].tolist(), lengths)
        for name in told
    }
    known = {name: shape for name, shape in shapes.items() if shape is not None}
    for name, array in (*graph.weights.items(), *graph.constants.items()):
        known[name] = tuple(Extent(size) for size in array.shape)
    known[INPUTS] = _input_shape(wanted)
    values = {name: (first[name], second[name]) for name in asked}
    return Probes(known, _types(model), values, lengths)


def kinds_of(graph: FlatGraph) -> dict[str, frozenset[str]]:
    """Tell of every value what decides it: weights, the batch's shape, the data in it."""
    kinds = {name: frozenset({"weight"}) for name in graph.weights}
    kinds |= dict.fromkeys(graph.constants, frozenset())
    kinds |= {"": frozenset(), INPUTS: frozenset({"data", "shape"})}
    for node in graph.nodes:
        is_shape = node.op_type in _SHAPES_ONLY
        found = frozenset().union(*(kinds[name] for name in node.input))
        kinds |= dict.fromkeys(node.output, frozenset({"shape"}) if is_shape else found)
    return kinds


def assemble(
    graph: FlatGraph, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]
) -> onnx.ModelProto:
    """Make a model of nodes whose weights are inputs."""
    inputs = [it for it in graph.inputs if it.name == INPUTS]
    for name, array in graph.weights.items():
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape))
    constants = [numpy_helper.from_array(it, name) for name, it in graph.constants.items()]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    return helper.make_model(
        helper.make_graph(nodes, "probe", inputs, results, constants),
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )


def random_inputs(wanted: ModelInput, examples: int, tokens: int, seed: int = 0) -> NDArray[Any]:
    """Draw a batch; one text of several is shorter than the others."""
    generator = np.random.default_rng([seed, examples])
    if isinstance(wanted, TokenInput):
        texts = generator.integers(0, wanted.vocabulary_size, (examples, tokens), dtype=np.int64)
        texts[1:, -2:] = -1
        return texts
    shape = (examples, wanted.channels, wanted.size_px, wanted.size_px)
    return generator.standard_normal(shape, dtype=np.float32)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = shape_inference.infer_shapes(model).graph
    told = (*graph.input, *graph.value_info, *graph.output)
    return {it.name: it.type.tensor_type.elem_type for it in told}


def _input_shape(wanted: ModelInput) -> tuple[Extent, ...]:
    batch = Extent(1, of_batch=True)
    if isinstance(wanted, TokenInput):
        return (batch, Extent(1, of_tokens=True))
    return (batch, Extent(wanted.channels), Extent(wanted.size_px), Extent(wanted.size_px))


def _extents(
    first: Sequence[int], second: Sequence[int], lengths: tuple[int, int]
) -> tuple[Extent, ...] | None:
    if len(first) != len(second):
        return None
    found = [_extent(pair, lengths) for pair in zip(first, second, strict=True)]
    return None if None in found else tuple(it for it in found if it is not None)


def _extent(sizes: tuple[int, int], lengths: tuple[int, int]) -> Extent | None:
    """Find the simplest rule that gives both sizes."""
    candidates = [Extent(sizes[0])]
    for flags in ((True, False), (False, True), (True, True)):
        unit = Extent(1, *flags).size(_BATCHES[0], lengths[0])
        candidates.append(Extent(sizes[0] // unit, *flags))
    candidates.append(Extent(1, of_tokens=True, offset=sizes[0] - lengths[0]))
    for extent in candidates:
        if tuple(map(extent.size, _BATCHES, lengths)) == sizes:
            return extent
    return None
