"""Allocation: budgets are kept, layers are covered, draws can be repeated (invariant 4)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedra_edge.protocol.ids import ClientId
from fedra_server.allocation import draw_allocation
from fedra_server.runs import AllocationScheme

SCHEMES: list[AllocationScheme] = ["balanced", "independent"]


@st.composite
def populations(draw: st.DrawFn) -> tuple[dict[ClientId, int], list[int]]:
    """Budgets of 1..8 clients and the last trained round of 1..16 layers."""
    num_layers = draw(st.integers(1, 16))
    budgets = draw(st.lists(st.integers(1, num_layers), min_size=1, max_size=8))
    last_trained = draw(st.lists(st.integers(0, 9), min_size=num_layers, max_size=num_layers))
    return {ClientId(f"client-{i}"): budget for i, budget in enumerate(budgets)}, last_trained


@given(populations(), st.integers(0, 2**32), st.sampled_from(SCHEMES))
def test_every_row_has_exactly_its_budget(
    population: tuple[dict[ClientId, int], list[int]], seed: int, scheme: AllocationScheme
) -> None:
    budgets, last_trained = population
    matrix = draw_allocation(scheme, budgets, last_trained, np.random.default_rng(seed))
    assert {client: len(row) for client, row in matrix.rows.items()} == budgets


@given(populations(), st.integers(0, 2**32))
def test_balanced_holders_are_the_floor_or_ceiling_of_the_mean(
    population: tuple[dict[ClientId, int], list[int]], seed: int
) -> None:
    budgets, last_trained = population
    matrix = draw_allocation("balanced", budgets, last_trained, np.random.default_rng(seed))
    mean = sum(budgets.values()) / len(last_trained)
    assert set(matrix.coverage()) <= {math.floor(mean), math.ceil(mean)}


@given(populations(), st.integers(0, 2**32))
def test_scarce_budgets_go_to_the_longest_starved_layers(
    population: tuple[dict[ClientId, int], list[int]], seed: int
) -> None:
    budgets, last_trained = population
    matrix = draw_allocation("balanced", budgets, last_trained, np.random.default_rng(seed))
    coverage = matrix.coverage()
    covered = [last_trained[layer] for layer, holders in enumerate(coverage) if holders]
    uncovered = [last_trained[layer] for layer, holders in enumerate(coverage) if not holders]
    assert not uncovered or max(covered) <= min(uncovered)


@given(populations(), st.integers(0, 2**32), st.sampled_from(SCHEMES))
def test_the_same_seed_draws_the_same_matrix_whatever_the_order_of_clients(
    population: tuple[dict[ClientId, int], list[int]], seed: int, scheme: AllocationScheme
) -> None:
    budgets, last_trained = population
    reversed_budgets = dict(reversed(budgets.items()))
    first = draw_allocation(scheme, budgets, last_trained, np.random.default_rng(seed))
    again = draw_allocation(scheme, reversed_budgets, last_trained, np.random.default_rng(seed))
    assert first == again


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_client_holds_a_layer_with_chance_budget_over_layers(scheme: AllocationScheme) -> None:
    """The paper's mix on 12 layers; 4000 draws put the standard error below 0.008."""
    budgets = {ClientId(f"client-{k}"): k for k in (12, 10, 8, 6, 4, 3)}
    generator = np.random.default_rng(7)
    draws = 4000
    counts = {client: np.zeros(12) for client in budgets}
    for _ in range(draws):
        matrix = draw_allocation(scheme, budgets, [0] * 12, generator)
        for client, row in matrix.rows.items():
            counts[client][list(row)] += 1
    for client, budget in budgets.items():
        np.testing.assert_allclose(counts[client] / draws, budget / 12, atol=0.04)


@pytest.mark.parametrize("budget", [0, 5])
def test_an_impossible_budget_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match=r"not in 1\.\.4"):
        draw_allocation("balanced", {ClientId("client"): budget}, [0] * 4, np.random.default_rng(0))
