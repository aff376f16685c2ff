"""Draws a round's allocation matrix: which participant trains which layers. Pure.

The random generator is an argument, keyed by (run seed, round, draw) at the call site, so any
round can be drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedra_edge.protocol.allocation import AllocationMatrix
from fedra_edge.protocol.ids import ClientId, LayerId
from fedra_server.runs import AllocationScheme


def draw_allocation(
    scheme: AllocationScheme,
    budgets: Mapping[ClientId, int],
    last_trained: Sequence[int],
    generator: np.random.Generator,
) -> AllocationMatrix:
    """Draw one row per participant, of exactly its budget, over ``len(last_trained)`` layers.

    Args:
        scheme: ``balanced`` guarantees coverage, ``independent`` is FedRA as published.
        budgets: Layers each participant trains, 1 .. number of layers.
        last_trained: Per layer, the round in which it was last trained, 0 for never.
        generator: The only source of randomness.

    Raises:
        ValueError: A budget is outside 1 .. number of layers.
    """
    num_layers = len(last_trained)
    for client_id, budget in budgets.items():
        if not 1 <= budget <= num_layers:
            raise ValueError(f"budget {budget} of {client_id} is not in 1..{num_layers}")
    draw = _draw_balanced if scheme == "balanced" else _draw_independent
    return AllocationMatrix(num_layers=num_layers, rows=draw(budgets, last_trained, generator))


def _draw_balanced(
    budgets: Mapping[ClientId, int], last_trained: Sequence[int], generator: np.random.Generator
) -> dict[ClientId, tuple[LayerId, ...]]:
    """Lay the rows end to end on a circle of randomly permuted layers (systematic sampling).

    With sum(budgets) >= L every layer gets the floor or the ceiling of sum(budgets) / L holders
    and participant i holds any given layer with chance budget_i / L. With less, the circle
    starts at the layers that have waited longest, so those are covered first.
    """
    num_layers = len(last_trained)
    circle = [int(layer) for layer in generator.permutation(num_layers)]
    if sum(budgets.values()) < num_layers:
        circle.sort(key=lambda layer: last_trained[layer])
    rows: dict[ClientId, tuple[LayerId, ...]] = {}
    start = 0
    for client_id in sorted(budgets):
        stop = start + budgets[client_id]
        row = sorted(circle[index % num_layers] for index in range(start, stop))
        rows[client_id] = tuple(LayerId(layer) for layer in row)
        start = stop
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
