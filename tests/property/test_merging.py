"""Merging: FedRA's formula, whatever the order of arrival (invariants 1 to 3)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.tensors import FloatArray
from fedra_server.merging import (
    Contributor,
    head_weight,
    in_merge_order,
    layer_weight,
    merge_piece,
    merge_tensor,
)

SHAPE = (3, 5)


def arrays(seed: int, count: int) -> list[FloatArray]:
    """Draw float32 arrays whose magnitudes differ, so that a wrong order of summation shows."""
    generator = np.random.default_rng(seed)
    return [
        (generator.normal(size=SHAPE) * 10.0 ** generator.integers(-6, 6)).astype(np.float32)
        for _ in range(count)
    ]


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_a_merge_equals_the_papers_formula(seed: int, count: int) -> None:
    base, *deltas = arrays(seed, count + 1)
    weights = np.random.default_rng(seed).uniform(0.1, 4.0, size=count)
    merged = merge_tensor(base, zip(weights.tolist(), deltas, strict=True))
    reference = base.astype(np.float64)
    for weight, delta in zip(weights, deltas, strict=True):
        reference = reference + weight / weights.sum() * delta.astype(np.float64)
    np.testing.assert_allclose(merged, reference, rtol=1e-6, atol=1e-9)
    assert merged.dtype == np.float32


@given(st.integers(0, 2**32), st.permutations(range(6)))
def test_the_order_of_arrival_leaves_no_trace_in_any_bit(seed: int, order: list[int]) -> None:
    base, *deltas = arrays(seed, 7)
    contributors = [Contributor(AssignmentId(f"id-{i}"), i + 1, 0.5) for i in range(6)]
    by_contributor = dict(zip(contributors, deltas, strict=True))

    def merged(arrival: list[Contributor]) -> FloatArray:
        ordered = in_merge_order(arrival)
        return merge_tensor(base, [(float(c.num_examples), by_contributor[c]) for c in ordered])

    shuffled = merged([contributors[i] for i in order])
    assert shuffled.tobytes() == merged(contributors).tobytes()


@given(st.integers(0, 2**32), st.floats(0.01, 100))
def test_only_ratios_of_weights_matter(seed: int, factor: float) -> None:
    base, first, second = arrays(seed, 3)
    once = merge_tensor(base, [(1.0, first), (3.0, second)])
    scaled = merge_tensor(base, [(factor, first), (3 * factor, second)])
    np.testing.assert_allclose(once, scaled, rtol=1e-5, atol=1e-9)


@given(st.integers(0, 2**32), st.floats(0.01, 100))
def test_a_single_holder_moves_the_layer_by_its_whole_delta(seed: int, weight: float) -> None:
    base, delta = arrays(seed, 2)
    moved = merge_tensor(base, [(weight, delta)])
    np.testing.assert_allclose(moved, base.astype(np.float64) + delta, rtol=1e-6, atol=1e-9)


def test_a_merge_without_holders_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one delta"):
        merge_tensor(arrays(0, 1)[0], [])


def test_every_tensor_of_a_piece_is_merged() -> None:
    """The published code forgot one factor of one layer; a loop over names cannot."""
    first, second, delta_first, delta_second = arrays(3, 4)
    delta = {"a": delta_first, "b": delta_second}
    merged = merge_piece({"a": first, "b": second}, [(1.0, delta.__getitem__)])
    np.testing.assert_allclose(merged["a"], first + delta_first, rtol=1e-5)
    np.testing.assert_allclose(merged["b"], second + delta_second, rtol=1e-5)


def test_the_three_weightings() -> None:
    small = Contributor(AssignmentId("small"), num_examples=50, chance=3 / 12)
    tiny = Contributor(AssignmentId("tiny"), num_examples=10, chance=1 / 12)
    assert layer_weight("uniform", small, 4.0) == 1.0
    assert layer_weight("num_examples", small, 4.0) == 50.0
    assert layer_weight("inverse_chance", small, 4.0) == pytest.approx(4.0)
    assert layer_weight("inverse_chance", tiny, 4.0) == 4.0
    assert head_weight("inverse_chance", tiny) == head_weight("uniform", small) == 1.0
    assert head_weight("num_examples", tiny) == 10.0
