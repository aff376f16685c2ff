"""Merges deltas of one piece into its next state. Pure, exact in its order.

For a piece with holders S (the deltas that have it and are merged now) and weights w_i:

    mean = sum(w_i * delta_i for i in S) / sum(w_i for i in S)

and the server optimizer moves the piece by it; with plain averaging, next = base + mean, which is
FedRA's per-layer aggregation (arXiv 2311.11227, section 3) when all weights are equal. A delta
that is stale, because the piece was merged since it was trained, weighs less (FedBuff, arXiv
2106.06639). A piece without holders is not merged at all: its blob stays the one it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.layers import HEAD
from fedra_edge.protocol.tensors import FloatArray
from fedra_server.runs import RunSpec, ServerOptimizerSpec
from fedra_server.server_optimizers import Float64Array, move


@dataclass(frozen=True, slots=True)
class Contributor:
    """What a merge must know of a delta besides its tensors."""

    assignment_id: AssignmentId
    num_examples: int
    chance: float


@dataclass(frozen=True)
class PieceState:
    """A piece's tensors by full name, and the moments of each tensor; none before its first."""

    tensors: Mapping[str, FloatArray]
    moments: Mapping[str, Mapping[str, FloatArray]]


def piece_weight(
    spec: RunSpec,
    contributor: Contributor,
    piece: str,
    staleness: int,
    most_examples: float = math.inf,
) -> float:
    """Weigh a contributor within the holders of a piece; only ratios matter.

    ``inverse_chance`` is the Horvitz-Thompson weight 1 / chance, capped, self-normalised by the
    merge; it stops machines that hold many layers from dominating each of them. The head is held
    by every participant. A claim of more examples than ``most_examples`` weighs no more.
    """
    decay = float((1.0 + staleness) ** -spec.staleness_exponent)
    match spec.merge_weighting:
        case "num_examples":
            return min(contributor.num_examples, most_examples) * decay
        case "inverse_chance" if piece != HEAD:
            return min(1.0 / contributor.chance, spec.max_inverse_chance) * decay
        case "uniform" | "inverse_chance":
            return decay


def weight_sum(weights: Iterable[float]) -> float:
    """Add up the weights of a piece's holders, one after the other.

    Raises:
        ValueError: There is none, or they sum to zero.
    """
    total = 0.0
    for weight in weights:
        total += weight
    if total <= 0:
        raise ValueError("a merge needs at least one delta of positive weight")
    return total


def merge_piece(
    base: PieceState,
    sums: Mapping[str, Float64Array],
    weights: Iterable[float],
    optimizer: ServerOptimizerSpec,
) -> PieceState:
    """Move every tensor of a piece by the mean of its deltas.

    Args:
        base: The piece's present state.
        sums: Weight times delta, added up over the holders, of every tensor.
        weights: Of the holders, in the order in which they were added.
        optimizer: How a mean moves a tensor.
    """
    divisor = weight_sum(weights)
    moved = {
        name: move(
            optimizer, tensor, sums[name].reshape(tensor.shape) / divisor,
            base.moments.get(name, {}),
        )
        for name, tensor in base.tensors.items()
    }  # fmt: skip
    return PieceState(
        {name: tensor for name, (tensor, _) in moved.items()},
        {name: moments for name, (_, moments) in moved.items() if moments},
    )
