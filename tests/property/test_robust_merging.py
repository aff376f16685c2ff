"""Robust merges and screening: bounds on what attackers reach, and honest cohorts left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedra_edge.protocol.ids import AssignmentId, ClientId, RunId
from fedra_edge.protocol.layers import HEAD
from fedra_edge.protocol.tensors import serialize_tensors
from fedra_server import combining
from fedra_server.combining import combine_deltas, coordinate_median, trimmed_mean
from fedra_server.measuring import folded_sum
from fedra_server.runs import RunSpec
from fedra_server.screening import Measure, Verdict, examples_caps, judge, lower_median
from fedra_server.server_optimizers import Float64Array
from fedra_server.storage.records import MergeRecord
from tests.support.builders import make_run_spec

ROBUST = ["norm-clipped-mean", "trimmed-mean", "coordinate-median"]
HONEST = st.floats(-1, 1)
HOSTILE = st.floats(-1e6, 1e6)
STRICT = make_run_spec(screening={"cosine_floor": -0.15})


def rows_of(values: st.SearchStrategy[float], count: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(values, min_size=3, max_size=3), min_size=count, max_size=count)


def robust(merge: str, attackers: int = 1, **fields: object) -> RunSpec:
    options = {"merge": merge, "tolerated_attackers": attackers, "min_participants": 1000}
    return make_run_spec(**{**options, **fields})


def measures(norms: list[float], cosines: list[float | None] | None = None) -> list[Measure]:
    turned = cosines or [None] * len(norms)
    return [
        Measure(AssignmentId(f"a{i:03}"), ClientId(f"c{i:03}"), HEAD, norm, cosine)
        for i, (norm, cosine) in enumerate(zip(norms, turned, strict=True))
    ]


def verdicts(spec: RunSpec, judged: list[Measure]) -> list[Verdict]:
    found = judge(spec, judged)
    return [found[it.assignment_id, it.piece].verdict for it in judged]


@st.composite
def attacked(draw: st.DrawFn) -> tuple[RunSpec, Float64Array, Float64Array, Float64Array]:
    """Give a merge, honest values, all values with the tolerated attackers' among them, weights."""
    attackers = draw(st.integers(1, 3))
    merge = draw(st.sampled_from(["trimmed-mean", "coordinate-median"]))
    spec = robust(merge, attackers, trim_fraction=draw(st.sampled_from([0.1, 0.2, 0.29, 0.45])))
    count = spec.holders_needed + draw(st.integers(0, 4)) - attackers
    honest = draw(rows_of(HONEST, count))
    hostile = draw(rows_of(HOSTILE, attackers))
    values = np.array(draw(st.permutations([*honest, *hostile])))
    weights = draw(st.lists(st.floats(0.01, 1e9), min_size=len(values), max_size=len(values)))
    return spec, np.array(honest), values, np.array(weights)


@given(attacked())
def test_tolerated_attackers_do_not_leave_the_range_of_honest_values(
    case: tuple[RunSpec, Float64Array, Float64Array, Float64Array],
) -> None:
    """However heavy they claim to be."""
    spec, honest, values, weights = case
    combine = combining.combination(spec)
    assert combine is not None
    merged = combine(values, weights)
    assert (merged >= honest.min(axis=0) - 1e-9).all()
    assert (merged <= honest.max(axis=0) + 1e-9).all()


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(0, 4))
def test_combinations_are_what_sorting_by_hand_gives(seed: int, count: int, trimmed: int) -> None:
    generator = np.random.default_rng(seed)
    values, weights = generator.normal(size=(count, 4)), generator.uniform(0.1, 4, count)
    trimmed = min(trimmed, (count - 1) // 2)
    np.testing.assert_array_equal(coordinate_median(values, weights), np.median(values, axis=0))
    for column in range(4):
        kept = sorted(zip(values[:, column], weights, strict=True))[trimmed : count - trimmed]
        mean = sum(value * weight for value, weight in kept) / sum(weight for _, weight in kept)
        result = trimmed_mean(values, weights, trimmed)[column]
        assert result == pytest.approx(mean, rel=1e-9, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40))
def test_how_large_a_block_is_leaves_no_trace_in_any_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, count: int, block: int
) -> None:
    directory = tmp_path_factory.mktemp("blocks")
    generator = np.random.default_rng(seed)
    sizes, rows = {"head/a": 5, "layers.0/b": 7}, []
    for index in range(count):
        tensors = {name: generator.normal(size=size).astype("f4") for name, size in sizes.items()}
        (directory / f"a{index}").write_bytes(serialize_tensors(tensors))
        for piece in ("head", "layers.0"):
            scale = float(generator.uniform(0.1, 1))
            rows.append(MergeRecord(AssignmentId(f"a{index}"), piece, RunId("r"), 1, 1.0, 0, scale))

    def combined() -> bytes:
        def file(assignment_id: AssignmentId) -> Path:
            return directory / assignment_id

        return combine_deltas(sizes, rows, file, coordinate_median).tobytes()

    once = combined()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combining, "_BLOCK_VALUES", block)
        assert combined() == once


@given(st.lists(st.floats(-1e3, 1e3), max_size=300))
def test_a_folded_sum_is_a_sum(values: list[float]) -> None:
    assert folded_sum(np.array(values)) == pytest.approx(sum(values), rel=1e-9, abs=1e-6)


@given(st.integers(1, 12), st.floats(0, 1e6), st.sampled_from(["mean", *ROBUST]))
def test_equal_honest_deltas_are_left_alone(count: int, norm: float, merge: str) -> None:
    cosines: list[float | None] = [1.0 if norm and count > 1 else None] * count
    judged = judge(robust(merge), measures([norm] * count, cosines))
    assert {(it.verdict, it.scale) for it in judged.values()} == {(Verdict.ACCEPTED, 1.0)}


@given(st.lists(st.floats(1, 2.9), min_size=1, max_size=12), st.floats(-1, 0.09))
def test_sites_that_disagree_with_each_other_are_left_alone(
    norms: list[float], cosine: float
) -> None:
    """Sites whose labels have nothing in common all point away from the mean of the others."""
    cosines: list[float | None] = [cosine] * len(norms)
    assert set(verdicts(make_run_spec(), measures(norms, cosines))) == {Verdict.ACCEPTED}


@given(
    st.lists(st.floats(0.5, 1.5), min_size=3, max_size=9),
    st.lists(st.floats(1e3, 1e9), min_size=1, max_size=4),
)
def test_a_minority_of_huge_deltas_is_quarantined_and_nobody_else(
    honest: list[float], huge: list[float]
) -> None:
    huge = huge[: (len(honest) - 1) // 2]
    judged = measures([*honest, *huge])
    told = verdicts(make_run_spec(), judged)
    assert told[: len(honest)] == [Verdict.ACCEPTED] * len(honest)
    assert told[len(honest) :] == [Verdict.QUARANTINED] * len(huge)


@given(st.lists(st.floats(0, 1e3), min_size=3, max_size=9), st.permutations(range(9)))
def test_the_order_of_measures_does_not_matter(norms: list[float], order: list[int]) -> None:
    judged = measures(norms, [0.5] * len(norms))
    shuffled = [judged[index] for index in order if index < len(judged)]
    spec = robust("norm-clipped-mean")
    assert judge(spec, judged) == judge(spec, shuffled)


def test_one_that_points_away_from_the_others_is_quarantined() -> None:
    cosines: list[float | None] = [0.1, 0.0, 0.2, -0.16]
    told = verdicts(STRICT, measures([1.0] * 4, cosines))
    assert told == [Verdict.ACCEPTED] * 3 + [Verdict.QUARANTINED]
    told = verdicts(make_run_spec(screening={"enabled": False}), measures([1.0] * 4, cosines))
    assert told == [Verdict.ACCEPTED] * 4


def test_a_turned_piece_does_not_condemn_the_rest_of_a_delta() -> None:
    """What attacks one layer only is told by that layer; cosines of one layer scatter."""
    spec, names = STRICT, [f"layers.{it}" for it in range(4)]
    for cosine, expected in ((-0.4, Verdict.ACCEPTED), (-0.5, Verdict.QUARANTINED)):
        judged = [
            Measure(AssignmentId(f"a{i}"), ClientId(f"c{i}"), piece, 1.0, 0.2)
            for i in range(4)
            for piece in names
        ]
        judged[-1] = Measure(AssignmentId("a3"), ClientId("c3"), names[-1], 1.0, cosine)
        told = verdicts(spec, judged)
        assert told[:-1] == [Verdict.ACCEPTED] * 15
        assert told[-1] is expected


def test_where_most_deltas_are_nothing_the_others_are_left_alone() -> None:
    told = verdicts(make_run_spec(), measures([0.0, 0.0, 5.0]))
    assert told == [Verdict.ACCEPTED] * 3


def test_a_clipped_delta_ends_at_the_bound() -> None:
    spec = robust("norm-clipped-mean")
    found = judge(spec, measures([1.0, 2.0, 4.0]))
    assert [it.scale for it in found.values()] == [1.0, 1.0, 0.5]
    assert [it.verdict for it in found.values()][-1] is Verdict.CLIPPED


def test_what_too_few_hold_shares_the_fate_of_what_was_judged_of_its_delta() -> None:
    judged = measures([1.0, 1.0, 1.0, 100.0])
    layer = [Measure(it.assignment_id, it.client_id, "layers.0", 1.0, None) for it in judged[-2:]]
    found = judge(make_run_spec(), [*judged, *layer])
    assert [found[it.assignment_id, "layers.0"].verdict for it in layer] == [
        Verdict.ACCEPTED,
        Verdict.QUARANTINED,
    ]


def test_a_client_has_one_say_however_many_deltas_it_has() -> None:
    honest = measures([1.0, 1.1, 0.9])
    flood = [Measure(AssignmentId(f"x{i}"), ClientId("loud"), HEAD, 1000.0, None) for i in range(9)]
    told = verdicts(make_run_spec(), [*honest, *flood])
    assert told == [Verdict.ACCEPTED] * 3 + [Verdict.QUARANTINED] * 9


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=9), st.integers(1, 2**31))
def test_an_absurd_claim_buys_no_weight(claims: list[int], absurd: int) -> None:
    spec = make_run_spec()
    cap = examples_caps(spec, [(HEAD, it) for it in [*claims, absurd]])[HEAD]
    assert cap <= spec.screening.examples_factor * max(claims)
    assert cap == spec.screening.examples_factor * lower_median([*claims, absurd])
    off = make_run_spec(screening={"enabled": False})
    assert examples_caps(off, [(HEAD, absurd)])[HEAD] == float("inf")


@pytest.mark.parametrize(
    ("merge", "attackers", "fraction", "needed"),
    [
        ("mean", 3, 0.2, 1), ("coordinate-median", 1, 0.2, 3), ("coordinate-median", 3, 0.2, 7),
        ("norm-clipped-mean", 2, 0.2, 5), ("trimmed-mean", 1, 0.2, 5), ("trimmed-mean", 1, 0.1, 10),
        ("trimmed-mean", 3, 0.45, 7),
    ],
)  # fmt: skip
def test_merges_state_the_holders_that_they_need_and_runs_are_held_to_it(
    merge: str, attackers: int, fraction: float, needed: int
) -> None:
    options = {"merge": merge, "tolerated_attackers": attackers, "trim_fraction": fraction}
    assert make_run_spec(**options, min_participants=needed).holders_needed == needed
    if needed == 1:
        return
    with pytest.raises(ValidationError, match=f"--min-participants {needed}"):
        make_run_spec(**options, min_participants=needed - 1)
    with pytest.raises(ValidationError, match=f"--buffer-size {needed}"):
        make_run_spec(**options, min_participants=needed, mode="buffered", buffer_size=needed - 1)
    with pytest.raises(ValidationError, match="--allocation balanced"):
        make_run_spec(**options, min_participants=needed, allocation="independent")
