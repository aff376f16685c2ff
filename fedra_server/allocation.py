"""Draws a round's allocation matrix: which participant trains which layers. Pure.

The random generator is an argument, keyed by (run seed, round, draw) at the call site, so any
round can be drawn again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fedra_edge.protocol.allocation import AllocationMatrix
from fedra_edge.protocol.ids import ClientId, LayerId
from fedra_server.runs import AllocationScheme


def draw_allocation(
    scheme: AllocationScheme,
    budgets: Mapping[ClientId, int],
    last_trained: Sequence[int],
    generator: np.random.Generator,
    holders_needed: int = 1,
) -> AllocationMatrix:
    """Draw one row per participant, of exactly its budget, over ``len(last_trained)`` layers.

    Args:
        scheme: ``balanced`` guarantees coverage, ``independent`` is FedRA as published.
        budgets: Layers each participant trains, 1 .. number of layers.
        last_trained: Per layer, the round in which it was last trained, 0 for never.
        generator: The only source of randomness.
        holders_needed: Below this a layer is not merged, so ``balanced`` rather gives it to
            fewer layers.

    Raises:
        ValueError: A budget is outside 1 .. number of layers.
    """
    num_layers = len(last_trained)
    for client_id, budget in budgets.items():
        if not 1 <= budget <= num_layers:
            raise ValueError(f"budget {budget} of {client_id} is not in 1..{num_layers}")
    if scheme == "balanced":
        rows = _draw_balanced(budgets, last_trained, generator, holders_needed)
    else:
        rows = _draw_independent(budgets, last_trained, generator)
    return AllocationMatrix(num_layers=num_layers, rows=rows)


def coverable_layers(budgets: Collection[int], num_layers: int, holders_needed: int) -> int:
    """Give how many layers can have so many holders at once, none of them one layer twice."""
    for count in range(num_layers, 0, -1):
        if sum(min(budget, count) for budget in budgets) >= holders_needed * count:
            return count
    return 0


def _draw_balanced(
    budgets: Mapping[ClientId, int],
    last_trained: Sequence[int],
    generator: np.random.Generator,
    holders_needed: int,
) -> dict[ClientId, tuple[LayerId, ...]]:
    """Lay the rows end to end on a circle of randomly permuted layers (systematic sampling).

    With sum(budgets) >= L every layer gets the floor or the ceiling of sum(budgets) / L holders
    and participant i holds any given layer with chance budget_i / L. When not all layers can have
    the holders that they need, the circle is of those that have waited longest, as many as can,
    so those are covered first; what a row has beyond them it takes from the others likewise.
    """
    num_layers = len(last_trained)
    circle = [int(layer) for layer in generator.permutation(num_layers)]
    wanted = coverable_layers(budgets.values(), num_layers, holders_needed)
    if wanted < num_layers:
        circle.sort(key=lambda layer: last_trained[layer])
    first, others = circle[:wanted], circle[wanted:]
    rows: dict[ClientId, tuple[LayerId, ...]] = {}
    start = start_of_others = 0
    for client_id in sorted(budgets):
        stop = start + min(budgets[client_id], wanted)
        stop_of_others = start_of_others + max(budgets[client_id] - wanted, 0)
        row = [first[index % wanted] for index in range(start, stop)]
        row += [others[it % len(others)] for it in range(start_of_others, stop_of_others)]
        rows[client_id] = tuple(LayerId(layer) for layer in sorted(row))
        start, start_of_others = stop, stop_of_others
    return rows


def _draw_independent(
    budgets: Mapping[ClientId, int], last_trained: Sequence[int], generator: np.random.Generator
) -> dict[ClientId, tuple[LayerId, ...]]:
    """Draw each row as a uniformly random subset (FedRA, arXiv 2311.11227, section 3)."""
    rows: dict[ClientId, tuple[LayerId, ...]] = {}
    for client_id in sorted(budgets):
        row = generator.choice(len(last_trained), size=budgets[client_id], replace=False)
        rows[client_id] = tuple(LayerId(int(layer)) for layer in np.sort(row))
    return rows
