"""Allocation for merges that need holders: as many layers as can have enough of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedra_edge.protocol.ids import ClientId
from fedra_server.allocation import coverable_layers, draw_allocation
from fedra_server.rounds import HeldSlice, last_handed_out
from tests.property.test_allocation import populations


@given(populations(), st.integers(0, 2**32), st.integers(1, 5))
def test_as_many_layers_as_can_have_the_holders_that_they_need(
    population: tuple[dict[ClientId, int], list[int]], seed: int, needed: int
) -> None:
    """They are those that have waited longest, and every budget is used in full."""
    budgets, last_trained = population
    generator = np.random.default_rng(seed)
    matrix = draw_allocation("balanced", budgets, last_trained, generator, needed)
    assert {client: len(set(row)) for client, row in matrix.rows.items()} == budgets
    wanted = coverable_layers(budgets.values(), len(last_trained), needed)
    coverage = matrix.coverage()
    covered = [layer for layer, holders in enumerate(coverage) if holders >= needed]
    assert len(covered) >= wanted
    if wanted == len(last_trained):
        return
    starved = sorted(last_trained)[:wanted]
    assert sorted(last_trained[layer] for layer in covered)[:wanted] == starved


@given(populations(), st.integers(1, 5))
def test_no_more_layers_could_have_them(
    population: tuple[dict[ClientId, int], list[int]], needed: int
) -> None:
    budgets, last_trained = population
    wanted = coverable_layers(budgets.values(), len(last_trained), needed)
    assert wanted * needed <= sum(min(it, max(wanted, 1)) for it in budgets.values())
    if wanted < len(last_trained):
        more = wanted + 1
        assert more * needed > sum(min(it, more) for it in budgets.values())


def test_who_is_drawn_alone_joins_a_layer_until_it_has_its_holders() -> None:
    held = [HeldSlice(f"a{i}", 0, ("layers.1", "head")) for i in range(2)]  # type: ignore[arg-type] # an id
    pieces = ("layers.0", "layers.1", "layers.2", "head")
    assert last_handed_out([4, 4, 4], pieces, held, 9) == [4, 9, 4]
    assert last_handed_out([4, 4, 4], pieces, held, 9, 2) == [4, 9, 4]
    assert last_handed_out([4, 4, 4], pieces, held, 9, 3) == [4, -1, 4]
