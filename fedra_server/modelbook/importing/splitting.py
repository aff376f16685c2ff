"""Cuts a model that is only there as ONNX into stem, equal blocks and head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import TensorProto, helper, numpy_helper

from fedra_edge.protocol.graphs import GRADIENT, HIDDEN, INPUTS, LOGITS, LORA_SCALE, OUT
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_edge.protocol.models import ModelInput
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.graphs.making import ForwardGraphs
from fedra_server.modelbook.graphs.writing import IR_VERSION, OPSET
from fedra_server.modelbook.importing.cutting import PRODUCTS, Region, Tracer, find_chain, tracer_of
from fedra_server.modelbook.importing.naming import WEIGHT, Use, name_weights
from fedra_server.modelbook.importing.probing import Extent
from fedra_server.modelbook.importing.reading import Array, FlatGraph, attributes_of
from fedra_server.modelbook.importing.simplifying import NUM_EXAMPLES, NUM_TOKENS, simplify

Arrays = dict[str, Array]
_RESERVED: Final = frozenset({HIDDEN, INPUTS, OUT, LOGITS, LORA_SCALE, GRADIENT})
_CONTEXT: Final = "context_"


@dataclass(frozen=True)
class SplitModel:
    """A model in pieces: graphs without weights, and the weights by piece and name.

    ``linears`` gives (out_features, in_features) of the linear layers of a block;
    ``head_parameters`` names the classifier's tensors.
    """

    tracer: Tracer
    stem: Region
    block: Region
    head: Region
    graphs: ForwardGraphs
    weights: dict[str, Arrays]
    linears: dict[str, tuple[int, int]]
    head_parameters: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        """How many equal blocks there are."""
        return len(self.weights) - 2  # all but stem and head

    @property
    def num_labels(self) -> int:
        """How many labels the model tells apart."""
        return self.tracer.probes.shapes[self.head.leaves][-1].factor


def split_graph(graph: FlatGraph, wanted: ModelInput) -> SplitModel:
    """Find the blocks of a model and cut it there.

    Raises:
        ConfigurationError: It is no chain of equal blocks, or has something that we cannot
            compute.
    """
    tracer = tracer_of(*simplify(graph, wanted))
    _check_output(tracer)
    chain = find_chain(tracer)
    block, head = chain.blocks[0], chain.head
    contexts = tuple(dict.fromkeys((*block.contexts, *head.contexts)))
    stem = _stem_region(tracer, block.enters, contexts)
    writer = _PieceWriter(tracer, {it: f"{_CONTEXT}{i}" for i, it in enumerate(contexts)})
    linears = _linears(tracer, block)
    block_names = writer.names(chain.blocks, {*linears})
    head_names = writer.names((head,), {*_linears(tracer, head)})
    stem_names = writer.names((stem,), set())
    pieces = {STEM: (stem, stem_names), HEAD: (head, head_names)}
    for index, each in enumerate(chain.blocks):
        pieces[layer_piece(LayerId(index))] = (each, block_names)
    return SplitModel(
        tracer=tracer,
        stem=stem,
        block=block,
        head=head,
        graphs=ForwardGraphs(
            stem=writer.model(stem, stem_names, {block.enters: HIDDEN, **writer.contexts}),
            block=writer.model(block, block_names, {block.leaves: OUT}),
            head=writer.model(head, head_names, {head.leaves: LOGITS}),
        ),
        weights={
            piece: {
                name: tracer.graph.weights[slot[2]]
                for name, slot in zip(names, region.slots, strict=True)
            }
            for piece, (region, names) in pieces.items()
        },
        linears={
            block_names[place].removesuffix(WEIGHT): shape for place, shape in linears.items()
        },
        head_parameters=tuple(head_names[place] for place in _classifier(tracer, head)),
    )


def _check_output(tracer: Tracer) -> None:
    shape = tracer.probes.shapes.get(tracer.graph.output, ())
    if len(shape) != 2 or shape[0] != Extent(1, of_batch=True) or not shape[1].is_static:  # noqa: PLR2004 (examples, labels)
        raise ConfigurationError(
            f"the model's output is {[it.dim for it in shape]}, not a row of logits per example",
            remedy="Export a model that tells classes apart, with logits as its first output.",
        )


def _stem_region(tracer: Tracer, hidden: str, contexts: Sequence[str]) -> Region:
    nodes = tracer.needed((hidden, *contexts), INPUTS, None)
    slots = tuple(
        (index, position, name)
        for index, node in enumerate(nodes)
        for position, name in enumerate(node.input)
        if name in tracer.graph.weights
    )
    return Region(INPUTS, hidden, nodes, slots, (), ())


def _linears(tracer: Tracer, region: Region) -> dict[int, tuple[int, int]]:
    """Find the weights, by their places, that are the right factor of a matrix product.

    Each comes with (out_features, in_features).
    """
    found = {}
    for place, (index, position, name) in enumerate(region.slots):
        node, is_turned, at = region.nodes[index], False, position
        users = [it for it in region.nodes if set(node.output) & set(it.input)]
        if node.op_type == "Transpose" and len(users) == 1:
            is_turned, at = True, list(users[0].input).index(node.output[0])
            node = users[0]
        shape, flags = tracer.graph.weights[name].shape, attributes_of(node)
        if node.op_type in PRODUCTS and at == 1 and len(shape) == 2:  # noqa: PLR2004 (a matrix)
            if flags.get("transA", 0) or flags.get("alpha", 1.0) != 1.0:
                continue
            is_out_first = is_turned != bool(flags.get("transB", 0))
            found[place] = (shape[0], shape[1]) if is_out_first else (shape[1], shape[0])
    return found


def _classifier(tracer: Tracer, head: Region) -> list[int]:
    """Find the places of the last linear layer's weight and bias."""
    linears = _linears(tracer, head)
    if not linears:
        raise ConfigurationError(
            "the model has no linear classifier after its blocks",
            remedy="Export a model whose last layer is a linear one.",
        )
    last = max(linears)
    product = next(it for it in head.nodes[head.slots[last][0] :] if it.op_type in PRODUCTS)
    added = {product.output[0]}
    return [
        place
        for place, (index, position, name) in enumerate(head.slots)
        if place == last
        or (head.nodes[index] is product and position > 1)
        or (
            head.nodes[index].op_type == "Add"
            and added & set(head.nodes[index].input)
            and tracer.graph.weights[name].ndim == 1
        )
    ]


@dataclass(frozen=True)
class _PieceWriter:
    """Writes pieces as graphs whose weights are inputs; ``contexts`` names what the stem adds."""

    tracer: Tracer
    contexts: dict[str, str]

    def names(self, regions: Sequence[Region], matrices: set[int]) -> list[str]:
        """Name the weights of pieces of one structure."""
        uses: list[list[Use]] = [
            [(it.nodes[index], position, name) for index, position, name in it.slots]
            for it in regions
        ]
        taken = {*_RESERVED, *self.contexts.values()}
        return name_weights(uses, self._counts(), matrices, taken)

    def model(
        self, region: Region, names: Sequence[str], outputs: dict[str, str]
    ) -> onnx.ModelProto:
        """Write a piece; ``outputs`` names what it gives."""
        entering = INPUTS if region.enters == INPUTS else HIDDEN
        local = {"": "", region.enters: entering, **outputs}
        local |= {name: self.contexts[name] for name in region.contexts}
        weights = {
            (index, at): name for name, (index, at, _) in zip(names, region.slots, strict=True)
        }
        nodes, constants = self._size_nodes(region, local), dict[str, onnx.TensorProto]()
        for index, node in enumerate(region.nodes):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            del copy.metadata_props[:]
            copy.doc_string = ""
            copy.name = f"{node.op_type}_{index}"
            for at, name in enumerate(node.input):
                if name in self.tracer.graph.constants and name not in local:
                    local[name] = f"constant_{len(constants)}"
                    array = self.tracer.graph.constants[name]
                    constants[name] = numpy_helper.from_array(array, local[name])
                copy.input[at] = weights.get((index, at)) or local[name]
            for at, name in enumerate(node.output):
                copy.output[at] = local.setdefault(name, f"{copy.name}_{at}" if at else copy.name)
            nodes.append(copy)
        made = {name for node in nodes for name in node.output}
        for value, name in outputs.items():
            if name not in made:
                nodes.append(helper.make_node("Identity", [value], [name]))
        given = [self._value(region.enters, entering)]
        given += [self._value(name, self.contexts[name]) for name in region.contexts]
        for name, (_, _, weight) in zip(names, region.slots, strict=True):
            shape = self.tracer.graph.weights[weight].shape
            given.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        graph = helper.make_graph(
            nodes,
            "piece",
            given,
            [self._value(value, name) for value, name in outputs.items()],
            list(constants.values()),
            value_info=[
                self._value(value, name)
                for value, name in local.items()
                if name in made and value not in outputs and value in self.tracer.probes.types
            ],
        )
        return helper.make_model(
            graph,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
            producer_name="fedra",
        )

    def _size_nodes(self, region: Region, local: dict[str, str]) -> list[onnx.NodeProto]:
        """Read the batch's sizes off what enters the piece."""
        if region.enters == INPUTS:
            return []
        used = {name for node in region.nodes for name in node.input}
        nodes = []
        for size, axis, extent in (
            (NUM_EXAMPLES, 0, Extent(1, of_batch=True)),
            (NUM_TOKENS, 1, Extent(1, of_tokens=True)),
        ):
            if size in used:
                if self.tracer.probes.shapes[region.enters][axis] != extent:
                    raise ConfigurationError("a block needs the length of the texts, which varies")
                local[size] = f"size_{axis}"
                shape = helper.make_node("Shape", [HIDDEN], [local[size]], start=axis, end=axis + 1)
                nodes.append(shape)
        return nodes

    def _counts(self) -> Counter[str]:
        return Counter(name for node in self.tracer.graph.nodes for name in node.input)

    def _value(self, value: str, name: str) -> onnx.ValueInfoProto:
        probes = self.tracer.probes
        shape = probes.shapes.get(value)
        dims = None if shape is None else [it.dim for it in shape]
        return helper.make_tensor_value_info(name, probes.types[value], dims)
