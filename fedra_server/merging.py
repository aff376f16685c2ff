"""Merges deltas of one piece into its next state. Pure, exact in its order.

For layer l with holders S_l (the participants whose delta has it) and weights w_i:

    next_l = base_l + sum(w_i * delta_il for i in S_l) / sum(w_i for i in S_l)

which is FedRA's per-layer aggregation (arXiv 2311.11227, section 3) when all weights are equal.
A layer without holders is not merged at all: its blob stays the one it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.tensors import FloatArray
from fedra_server.runs import MergeWeighting


@dataclass(frozen=True)
class Contributor:
    """What a merge must know of a delta besides its tensors."""

    assignment_id: AssignmentId
    num_examples: int
    chance: float


def layer_weight(weighting: MergeWeighting, contributor: Contributor, cap: float) -> float:
    """Weigh a contributor within the holders of a layer; only ratios matter.

    ``inverse_chance`` is the Horvitz-Thompson weight 1 / chance, capped, self-normalised by the
    merge; it stops machines that hold many layers from dominating each of them.
    """
    match weighting:
        case "uniform":
            return 1.0
        case "num_examples":
            return float(contributor.num_examples)
        case "inverse_chance":
            return min(1.0 / contributor.chance, cap)


def head_weight(weighting: MergeWeighting, contributor: Contributor) -> float:
    """Weigh a contributor for the head, which every participant holds."""
    return float(contributor.num_examples) if weighting == "num_examples" else 1.0


def in_merge_order(contributors: Iterable[Contributor]) -> list[Contributor]:
    """Fix the order of summation, so that the order of arrival leaves no trace in any bit."""
    return sorted(contributors, key=lambda contributor: contributor.assignment_id)


def merge_tensor(
    base: FloatArray, weighted_deltas: Iterable[tuple[float, FloatArray]]
) -> FloatArray:
    """Add the weighted mean of the deltas to the base; sums are kept in float64.

    Raises:
        ValueError: There is no delta, or the weights sum to zero.
    """
    total = np.zeros(base.shape, dtype=np.float64)
    weight_sum = 0.0
    for weight, delta in weighted_deltas:
        total += weight * delta.astype(np.float64)
        weight_sum += weight
    if weight_sum <= 0:
        raise ValueError("a merge needs at least one delta of positive weight")
    return (base.astype(np.float64) + total / weight_sum).astype(np.float32)


def merge_piece(
    base: Mapping[str, FloatArray],
    contributions: Sequence[tuple[float, Callable[[str], FloatArray]]],
) -> dict[str, FloatArray]:
    """Merge every tensor of a piece.

    Args:
        base: The piece's present state.
        contributions: In merge order, each holder's weight and the reader of its tensors, so
            that only one tensor of one delta is in memory at a time.
    """
    return {
        name: merge_tensor(tensor, ((weight, read(name)) for weight, read in contributions))
        for name, tensor in base.items()
    }
