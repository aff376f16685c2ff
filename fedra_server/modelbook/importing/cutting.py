"""Finds the chain of equal blocks in a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import onnx

from fedra_edge.protocol.graphs import INPUTS
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.importing.naming import named_by_index
from fedra_server.modelbook.importing.probing import Extent, Probes, kinds_of
from fedra_server.modelbook.importing.reading import FlatGraph
from fedra_server.modelbook.importing.simplifying import NUM_EXAMPLES, NUM_TOKENS

PRODUCTS: Final = frozenset({"MatMul", "Gemm"})
_SIZES: Final = frozenset({NUM_EXAMPLES, NUM_TOKENS})
_NONE_FOUND: Final = (
    "The model must be a chain of at least two layers of one structure, each with a linear layer, "
    "and take batches of any size; export it without optimizations that fuse operators."
)


@dataclass(frozen=True)
class Region:
    """The nodes between what enters a piece and what leaves it, in an order of their own.

    ``slots`` are the places of weights: a node's index, the input's, and the weight's name.
    ``contexts`` come from before the first block.
    """

    enters: str
    leaves: str
    nodes: tuple[onnx.NodeProto, ...]
    slots: tuple[tuple[int, int, str], ...]
    contexts: tuple[str, ...]
    structure: tuple[object, ...]

    @property
    def num_products(self) -> int:
        """How many matrix products with a weight there are."""
        return sum(self.nodes[index].op_type in PRODUCTS for index, _, _ in self.slots)


@dataclass(frozen=True)
class Tracer:
    """Walks back through a graph; ``trunk`` are the values that the blocks hand on or compute."""

    graph: FlatGraph
    probes: Probes
    producers: dict[str, onnx.NodeProto]
    kinds: dict[str, frozenset[str]]

    def region(self, enters: str, leaves: str, trunk: set[str]) -> Region:
        """Collect the nodes that a piece needs, from what leaves it back to what enters.

        Values of weights and shapes alone are computed in the piece; other values from beside
        the trunk are contexts.
        """
        nodes = self.needed((leaves,), enters, trunk)
        index_of = {name: (i, j) for i, it in enumerate(nodes) for j, name in enumerate(it.output)}
        slots, contexts, structure = [], dict[str, None](), []
        for index, node in enumerate(nodes):
            wired: list[object] = []
            for position, name in enumerate(node.input):
                if name in self.graph.weights:
                    slots.append((index, position, name))
                    wired.append(("weight", self.graph.weights[name].shape))
                elif name == enters:
                    wired.append("hidden")
                else:
                    wired.append(index_of.get(name, name))
                    if name not in index_of and self._is_context(name):
                        contexts[name] = None
            settings = sorted(it.SerializeToString(deterministic=True) for it in node.attribute)
            structure.append((node.op_type, *wired, *settings))
        return Region(enters, leaves, nodes, tuple(slots), tuple(contexts), tuple(structure))

    def needed(
        self, leaves: tuple[str, ...], enters: str, trunk: set[str] | None
    ) -> tuple[onnx.NodeProto, ...]:
        """Order the nodes before some values by how they are wired, not by how they are listed."""
        ordered: list[onnx.NodeProto] = []
        seen = {enters}
        waiting = [(name, False) for name in reversed(leaves)]
        while waiting:
            name, is_ready = waiting.pop()
            if is_ready:
                ordered.append(self.producers[name])
            elif name not in seen and self._is_inside(name, trunk):
                seen.update(self.producers[name].output)
                waiting.append((name, True))
                waiting += [(it, False) for it in reversed(self.producers[name].input)]
        return tuple(ordered)

    def trunk_from(self, source: str) -> tuple[set[str], list[str]]:
        """Give all that depends on a value, and the bottlenecks that all of it passes through."""
        nodes = [it for it in self.graph.nodes if it.op_type != "Shape"]
        users = Counter(name for node in nodes for name in set(node.input))
        users[self.graph.output] += 1
        trunk, open_values, cuts = {source}, {source}, [source]
        for node in nodes:
            if passed := trunk.intersection(node.input):
                users.subtract(passed)
                open_values -= {name for name in passed if not users[name]}
                used = [name for name in node.output if users[name]]
                trunk.update(used)
                open_values.update(used)
                if len(open_values) == 1:
                    cuts += open_values
        return trunk, list(dict.fromkeys(cuts))

    def _is_inside(self, name: str, trunk: set[str] | None) -> bool:
        if name not in self.producers or (trunk is not None and name in _SIZES):
            return False
        return trunk is None or name in trunk or "data" not in self.kinds[name]

    def _is_context(self, name: str) -> bool:
        return "data" in self.kinds[name]


@dataclass(frozen=True)
class Chain:
    """Equal blocks, one after the other, and the head after them."""

    blocks: tuple[Region, ...]
    head: Region


def tracer_of(graph: FlatGraph, probes: Probes) -> Tracer:
    """Prepare a graph for walking through it."""
    return Tracer(graph, probes, graph.producers, kinds_of(graph))


def find_chain(tracer: Tracer) -> Chain:
    """Find the longest chain of equal blocks.

    Raises:
        ConfigurationError: There are no two such blocks.
    """
    best: tuple[tuple[int, ...], Chain] = ((), Chain((), Region("", "", (), (), (), ())))
    passed: set[str] = set()
    for source in (INPUTS, *_activations(tracer)):
        if source in passed:
            continue
        trunk, cuts = tracer.trunk_from(source)
        passed.update(cuts)
        for size, edges in _repeats(tracer, trunk, cuts):
            if size >= best[0][: len(size)]:
                blocks = tuple(tracer.region(*pair, trunk) for pair in pairwise(edges))
                rating = (*size, _num_named_alike(blocks), cuts.index(edges[0]))
                if rating > best[0]:
                    head = tracer.region(edges[-1], tracer.graph.output, trunk)
                    best = rating, Chain(blocks, head)
        if best[0] and best[0][0] * 2 > _num_products(tracer.graph):
            break
    if not best[0]:
        raise ConfigurationError("no repeated block was found in the model", remedy=_NONE_FOUND)
    return best[1]


def _activations(tracer: Tracer) -> Iterator[str]:
    for node in tracer.graph.nodes:
        for name in node.output:
            if "data" in tracer.kinds[name] and _is_hidden(tracer, name):
                yield name


def _is_hidden(tracer: Tracer, name: str) -> bool:
    """Tell whether a value has the shape of activations: examples, tokens, features."""
    shape = tracer.probes.shapes.get(name, ())
    return len(shape) > 1 and shape[0] == Extent(1, of_batch=True)


def _repeats(
    tracer: Tracer, trunk: set[str], cuts: list[str]
) -> Iterator[tuple[tuple[int, int], list[str]]]:
    """Give runs of equal blocks between bottlenecks: how much they are, and their edges.

    More matrix products are more, then more blocks. Names decide among equals, elsewhere.
    """
    steps = [tracer.region(*pair, trunk) for pair in pairwise(cuts)]
    kinds: dict[tuple[object, ...], int] = {}
    line = [kinds.setdefault(step.structure, len(kinds)) for step in steps]
    for period in range(1, len(line) // 2 + 1):
        for start in range(len(line) - 2 * period + 1):
            block, count = line[start : start + period], 1
            while line[start + count * period : start + (count + 1) * period] == block:
                count += 1
            products = sum(step.num_products for step in steps[start : start + period])
            edges = [cuts[start + index * period] for index in range(count + 1)]
            shapes = {tracer.probes.shapes.get(name) for name in edges}
            if count > 1 and products and len(shapes) == 1 and _is_hidden(tracer, edges[0]):
                yield (products * count, count), edges


def _num_named_alike(blocks: tuple[Region, ...]) -> int:
    """Count the weights that are named by the number of their block."""
    return sum(
        named_by_index([block.slots[index][2] for block in blocks]) is not None
        for index in range(len(blocks[0].slots))
    )


def _num_products(graph: FlatGraph) -> int:
    return sum(
        node.op_type in PRODUCTS and not graph.weights.keys().isdisjoint(node.input)
        for node in graph.nodes
    )
