"""Works out what a piece of an ONNX model costs, from its nodes and the shapes between them."""

from __future__ import annotations

import math
from typing import Any

import onnx

from fedra_edge.protocol.models import ModelInput, PieceCost, TokenInput
from fedra_server.modelbook.importing.cutting import Region, Tracer
from fedra_server.modelbook.importing.reading import Array, attributes_of

_FLOAT_BYTES = 4


def piece_cost(
    tracer: Tracer, region: Region, weights: dict[str, Array], wanted: ModelInput
) -> PieceCost:
    """Give the cost per example, of the longest text if it reads texts.

    ``activation_bytes`` is an estimate: all values that depend on the data, as if kept at once.
    """
    tokens = wanted.max_tokens if isinstance(wanted, TokenInput) else 1

    def shape(name: str) -> list[int]:
        return [it.size(1, tokens) for it in tracer.probes.shapes.get(name, ())]

    made = [name for node in region.nodes for name in node.output if "data" in tracer.kinds[name]]
    return PieceCost(
        parameter_bytes=sum(array.nbytes for array in weights.values()),
        activation_bytes=_FLOAT_BYTES * sum(math.prod(shape(name)) for name in made),
        boundary_bytes=_FLOAT_BYTES * math.prod(shape(region.leaves)),
        forward_flops=sum(
            _flops(node, shape(node.output[0]), [shape(name) for name in node.input])
            for node in region.nodes
        ),
    )


def _flops(node: onnx.NodeProto, made: list[int], taken: list[list[int]]) -> int:
    """Count a multiplication and an addition for each term of each product."""
    flags: dict[str, Any] = attributes_of(node)
    match node.op_type:
        case "MatMul":
            terms = taken[0][-1]
        case "Gemm":
            terms = taken[0][0 if flags.get("transA", 0) else 1]
        case "Conv":
            terms = math.prod(taken[1][1:])
        case _:
            return 0
    return 2 * math.prod(made) * terms
