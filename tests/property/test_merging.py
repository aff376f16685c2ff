"""Merging: FedRA's formula, whatever the order of arrival (invariants 1 to 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedra_edge.protocol.ids import AssignmentId, RunId
from fedra_edge.protocol.layers import HEAD, LayerPositions
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.tensors import FloatArray, read_tensors, serialize_tensors
from fedra_server import piecewise, summing
from fedra_server.merging import Contributor, PieceState, merge_piece, piece_weight, weight_sum
from fedra_server.piecewise import flat_moments, merged_pieces
from fedra_server.publishing import (
    Arrival,
    initial_revision,
    merged_revision,
    trained_pieces,
    weigh,
)
from fedra_server.runs import RunSpec, ServerOptimizerSpec
from fedra_server.server_optimizers import Float64Array
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import MergeRecord, RevisionRecord
from fedra_server.summing import WeightedDelta, sum_deltas
from tests.support.builders import make_model_spec, make_run_spec

SHAPE = (3, 5)
LAYERS = 4
PLAIN = ServerOptimizerSpec()
ROWS = st.lists(st.sets(st.integers(0, LAYERS - 1), min_size=1), min_size=1, max_size=5)
KINDS = ["fedavg", "fedavgm", "fedadam", "fedyogi"]


def arrays(seed: int, count: int) -> list[FloatArray]:
    """Draw float32 arrays whose magnitudes differ, so that a wrong order of summation shows."""
    generator = np.random.default_rng(seed)
    return [
        (generator.normal(size=SHAPE) * 10.0 ** generator.integers(-6, 6)).astype(np.float32)
        for _ in range(count)
    ]


def merged(
    base: FloatArray, deltas: list[tuple[float, FloatArray]], optimizer: ServerOptimizerSpec = PLAIN
) -> FloatArray:
    """Merge one tensor."""
    total = np.zeros(SHAPE)
    for weight, delta in deltas:
        total += weight * delta.astype(np.float64)
    weights = [weight for weight, _ in deltas]
    state = PieceState({"head/a": base}, {})
    return merge_piece(state, {"head/a": total.ravel()}, weights, optimizer).tensors["head/a"]


@dataclass(frozen=True)
class Workbench:
    """A blob store with a first revision, and a run's rules to merge deltas into it by."""

    directory: Path
    blobs: BlobStore
    spec: ModelSpec
    base: RevisionRecord
    run_spec: RunSpec

    def under(self, **fields: object) -> Workbench:
        """Merge by other rules."""
        return replace(self, run_spec=make_run_spec(**fields))

    def arrival(self, name: str, row: set[int], base: RevisionRecord) -> Arrival:
        layer_ids = LayerPositions.of(sorted(row)).layer_ids
        shapes = self.spec.delta_shapes(self.run_spec.adapter, layer_ids)
        generator = np.random.default_rng(list(name.encode()))
        path = self.directory / f"{name}.safetensors"
        tensors = {key: generator.normal(size=shapes[key]).astype(np.float32) for key in shapes}
        path.write_bytes(serialize_tensors(tensors))
        contributor = Contributor(AssignmentId(name), 10 + len(row), len(row) / LAYERS)
        return Arrival(contributor, trained_pieces(layer_ids), base.versions, path)

    def merge(
        self, base: RevisionRecord, arrivals: list[Arrival], due: set[str] | None = None
    ) -> tuple[RevisionRecord, list[MergeRecord]]:
        return merged_revision(base, arrivals, self.run_spec, self.blobs, now=2.0, due_pieces=due)

    def tensors(self, revision: RevisionRecord) -> dict[str, FloatArray]:
        found: dict[str, FloatArray] = {}
        for blob in revision.blobs:
            found |= read_tensors(self.blobs.path(blob.sha256))
        return found

    def computed(self, arrivals: list[Arrival]) -> list[tuple[int, bytes]]:
        """Merge into the first revision without storing; give every bit that comes out."""
        paths = {arrival.contributor.assignment_id: arrival.path for arrival in arrivals}
        merges = weigh(self.base, arrivals, self.run_spec)
        groups = merged_pieces(
            self.base, merges, paths.__getitem__, self.run_spec.server_optimizer, self.blobs
        )
        return sorted(
            (index, serialize_tensors({**state.tensors, **flat_moments(state)}))
            for states in groups
            for index, state in states.items()
        )

    def moments(self, revision: RevisionRecord) -> dict[str, FloatArray]:
        found: dict[str, FloatArray] = {}
        for blob in revision.moments:
            found |= {} if blob is None else read_tensors(self.blobs.path(blob.sha256))
        return found


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    directory = tmp_path_factory.mktemp("merging")
    blobs, spec, run_spec = (
        BlobStore(directory / "blobs"),
        make_model_spec(num_layers=LAYERS),
        make_run_spec(),
    )
    head = {name: np.ones(shape, np.float32) for name, shape in spec.head_parameters.items()}
    weights = blobs.put_bytes(serialize_tensors(head))
    piece = spec.head.model_copy(update={"weights": weights})
    spec = spec.model_copy(update={"head": piece})
    base = initial_revision(spec, RunId("run"), run_spec, blobs, now=1.0)
    return Workbench(directory, blobs, spec, base, run_spec)


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_a_merge_equals_the_papers_formula(seed: int, count: int) -> None:
    base, *deltas = arrays(seed, count + 1)
    weights = np.random.default_rng(seed).uniform(0.1, 4.0, size=count)
    result = merged(base, list(zip(weights.tolist(), deltas, strict=True)))
    reference = base.astype(np.float64)
    for weight, delta in zip(weights, deltas, strict=True):
        reference = reference + weight / weights.sum() * delta.astype(np.float64)
    np.testing.assert_allclose(result, reference, rtol=1e-6, atol=1e-9)
    assert result.dtype == np.float32


@given(st.integers(0, 2**32), st.floats(0.01, 100))
def test_only_ratios_of_weights_matter(seed: int, factor: float) -> None:
    base, first, second = arrays(seed, 3)
    once = merged(base, [(1.0, first), (3.0, second)])
    scaled = merged(base, [(factor, first), (3 * factor, second)])
    np.testing.assert_allclose(once, scaled, rtol=1e-5, atol=1e-9)


@given(st.integers(0, 2**32), st.floats(0.01, 100))
def test_a_single_holder_moves_the_layer_by_its_whole_delta(seed: int, weight: float) -> None:
    base, delta = arrays(seed, 2)
    moved = merged(base, [(weight, delta)])
    np.testing.assert_allclose(moved, base.astype(np.float64) + delta, rtol=1e-6, atol=1e-9)


def test_a_merge_without_holders_is_an_error(workbench: Workbench) -> None:
    with pytest.raises(ValueError, match="at least one delta"):
        weight_sum([])
    at = workbench
    with pytest.raises(ValueError, match="at least one delta"):
        at.merge(at.base, [at.arrival("one", {1}, at.base)], due={"layers.0"})


def test_the_three_weightings() -> None:
    small = Contributor(AssignmentId("small"), num_examples=50, chance=3 / 12)
    tiny = Contributor(AssignmentId("tiny"), num_examples=10, chance=1 / 12)
    uniform, counted, inverse = (
        make_run_spec(merge_weighting=weighting)
        for weighting in ("uniform", "num_examples", "inverse_chance")
    )
    assert piece_weight(uniform, small, "layers.0", 0) == 1.0
    assert piece_weight(counted, small, "layers.0", 0) == 50.0
    assert piece_weight(inverse, small, "layers.0", 0) == pytest.approx(4.0)
    assert piece_weight(inverse, tiny, "layers.0", 0) == 4.0
    assert piece_weight(inverse, tiny, HEAD, 0) == piece_weight(uniform, small, HEAD, 0) == 1.0
    assert piece_weight(counted, tiny, HEAD, 0) == 10.0


@given(st.integers(1, 1000), st.floats(0.01, 1), st.integers(0, 50), st.floats(0, 3))
def test_staleness_lowers_a_weight_and_none_leaves_it(
    num_examples: int, chance: float, staleness: int, exponent: float
) -> None:
    contributor = Contributor(AssignmentId("one"), num_examples, chance)
    for weighting in ("uniform", "num_examples", "inverse_chance"):
        spec = make_run_spec(merge_weighting=weighting, staleness_exponent=exponent)
        for piece, cap in (("layers.0", 4.0), (HEAD, 1.0)):
            fresh = piece_weight(spec, contributor, piece, 0)
            by_rule = {"uniform": 1.0, "num_examples": float(num_examples)}
            assert fresh == by_rule.get(weighting, min(1 / chance, cap))
            stale = piece_weight(spec, contributor, piece, staleness)
            assert stale == pytest.approx(fresh / (1 + staleness) ** exponent)
            assert 0 < stale <= fresh


@settings(max_examples=20, deadline=None)
@given(ROWS, st.permutations(range(5)), st.sampled_from(KINDS))
def test_the_order_of_arrival_leaves_no_trace_in_any_bit(
    workbench: Workbench, rows: list[set[int]], order: list[int], kind: str
) -> None:
    at = workbench.under(server_optimizer={"kind": kind})
    arrivals = [at.arrival(f"c{i}", row, at.base) for i, row in enumerate(rows)]
    shuffled = [arrivals[index] for index in order if index < len(arrivals)]
    assert at.computed(shuffled) == at.computed(arrivals)


@settings(max_examples=20, deadline=None)
@given(ROWS, st.integers(1, 40), st.integers(1, 3), st.integers(1, 60))
def test_how_much_is_summed_at_once_leaves_no_trace_in_any_bit(
    workbench: Workbench, rows: list[set[int]], chunk: int, files: int, values: int
) -> None:
    at = workbench.under(merge_weighting="num_examples")
    arrivals = [at.arrival(f"c{i}", row, at.base) for i, row in enumerate(rows)]
    once = at.computed(arrivals)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summing, "_CHUNK_VALUES", chunk)
        patch.setattr(summing, "_FILES_AT_ONCE", files)
        patch.setattr(piecewise, "_VALUES_AT_ONCE", values)
        assert at.computed(arrivals) == once


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(ROWS, st.sets(st.integers(0, LAYERS))), min_size=1, max_size=4))
def test_only_covered_pieces_that_are_due_change_and_each_merge_is_recorded_once(
    workbench: Workbench,
    rounds: list[tuple[list[set[int]], set[int]]],
) -> None:
    """Blobs, moments and counters of all other pieces keep every bit."""
    at = workbench.under(server_optimizer={"kind": "fedyogi"})
    base = at.base
    for number, (rows, due_places) in enumerate(rounds):
        arrivals = [at.arrival(f"{number}-{i}", row, base) for i, row in enumerate(rows)]
        due = {base.pieces[place] for place in due_places}
        held = [(it.contributor.assignment_id, piece) for it in arrivals for piece in it.pieces]
        wanted = sorted((name, piece) for name, piece in held if piece in due)
        if not wanted:
            continue
        after, merges = at.merge(base, arrivals, due)
        assert sorted((it.assignment_id, it.piece) for it in merges) == wanted
        covered = {piece for _, piece in wanted}
        for index, piece in enumerate(base.pieces):
            is_same = (after.blobs[index], after.moments[index]) == (
                base.blobs[index],
                base.moments[index],
            )
            assert is_same is (piece not in covered)
            assert after.versions[index] == base.versions[index] + (piece in covered)
        base = after


def test_a_delta_is_as_stale_as_its_pieces_were_merged_since(workbench: Workbench) -> None:
    at = workbench.under(merge_weighting="uniform", staleness_exponent=1.0)
    late = at.arrival("late", {0, 1}, at.base)
    first, _ = at.merge(at.base, [at.arrival("quick", {1}, at.base)])
    second, merges = at.merge(first, [late, at.arrival("fresh", {1}, first)])
    told = {(it.assignment_id, it.piece): (it.weight, it.staleness) for it in merges}
    assert told == {
        ("late", "layers.0"): (1.0, 0),
        ("late", "layers.1"): (0.5, 1),
        ("late", "head"): (0.5, 1),
        ("fresh", "layers.1"): (1.0, 0),
        ("fresh", "head"): (1.0, 0),
    }
    name = next(name for name in at.tensors(first) if name.startswith("layers.1/"))
    stale, fresh = (
        read_tensors(at.directory / f"{it}.safetensors")[name] for it in ("late", "fresh")
    )
    expected = at.tensors(first)[name] + (0.5 * stale + fresh) / 1.5
    np.testing.assert_allclose(at.tensors(second)[name], expected, rtol=1e-5, atol=1e-6)


class Reference:
    """The server optimizers as the papers write them, in plain numpy and float64."""

    def __init__(self, kind: str, chosen: dict[str, float]) -> None:
        self.kind, self.rate, self.tau = kind, chosen["learning_rate"], chosen["tau"]
        self.momentum, self.beta2 = chosen["momentum"], chosen["beta2"]
        self.m: Float64Array | float = 0.0
        self.v: Float64Array | float = self.tau**2

    def step(self, x: Float64Array, delta: Float64Array) -> Float64Array:
        if self.kind == "fedavg":
            return x + self.rate * delta
        if self.kind == "fedavgm":
            self.m = self.momentum * self.m + delta
            return x + self.rate * self.m
        self.m = self.momentum * self.m + (1 - self.momentum) * delta
        if self.kind == "fedadam":
            self.v = self.beta2 * self.v + (1 - self.beta2) * delta**2
        else:
            self.v = self.v - (1 - self.beta2) * delta**2 * np.sign(self.v - delta**2)
        return x + self.rate * self.m / (np.sqrt(self.v) + self.tau)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.fixed_dictionaries(
        {
            "learning_rate": st.floats(0.01, 2),
            "momentum": st.floats(0, 0.95),
            "beta2": st.floats(0.5, 0.999),
            "tau": st.floats(0.05, 1),
        }
    ),
    st.lists(ROWS, min_size=1, max_size=3),
)
def test_server_optimizers_follow_their_papers(
    workbench: Workbench, kind: str, chosen: dict[str, float], rounds: list[list[set[int]]]
) -> None:
    """A layer that a round leaves out makes no step, so its moments do not decay either."""
    options = {"kind": kind, **chosen}
    at = workbench.under(merge_weighting="uniform", server_optimizer=options)
    revision = at.base
    state = {name: value.astype(np.float64) for name, value in at.tensors(revision).items()}
    references = {name: Reference(kind, chosen) for name in state}
    for number, rows in enumerate(rounds):
        arrivals = [at.arrival(f"{number}-{i}", row, revision) for i, row in enumerate(rows)]
        deltas = [read_tensors(it.path) for it in arrivals]
        revision, _ = at.merge(revision, arrivals)
        for name, present in state.items():
            held = [delta[name].astype(np.float64) for delta in deltas if name in delta]
            if held:
                state[name] = references[name].step(present, np.mean(held, axis=0))
    for name, value in at.tensors(revision).items():
        np.testing.assert_allclose(value, state[name], rtol=1e-4, atol=1e-4, err_msg=name)
    for name, value in at.moments(revision).items():
        tensor, _, moment = name.rpartition(".")
        wanted = references[tensor].m if moment == "momentum" else references[tensor].v
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def test_adaptive_optimizers_have_a_rate_of_their_own_unless_one_is_given() -> None:
    rates = {kind: ServerOptimizerSpec.model_validate({"kind": kind}).rate for kind in KINDS}
    assert rates == {"fedavg": 1.0, "fedavgm": 1.0, "fedadam": 0.01, "fedyogi": 0.01}
    assert ServerOptimizerSpec(kind="fedadam", learning_rate=1.0).rate == 1.0


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3))
def test_everybody_at_all_layers_and_equal_weights_is_plain_fedavg(
    workbench: Workbench, clients: int, times: int
) -> None:
    everything = set(range(LAYERS))
    at = workbench.under(merge_weighting="uniform")
    revision = at.base
    for number in range(times):
        before = at.tensors(revision)
        arrivals = [at.arrival(f"{number}-{i}", everything, revision) for i in range(clients)]
        trained = [
            {name: before[name] + delta for name, delta in read_tensors(it.path).items()}
            for it in arrivals
        ]
        revision, _ = at.merge(revision, arrivals)
        for name, value in at.tensors(revision).items():
            fedavg = np.mean([client[name] for client in trained], axis=0)
            np.testing.assert_allclose(value, fedavg, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(ROWS, st.sampled_from(["uniform", "num_examples"]))
def test_plain_averaging_gives_the_formula_to_the_bit(
    workbench: Workbench, rows: list[set[int]], weighting: str
) -> None:
    """In float64, summed in the order of assignments, rounded once: what older revisions hold."""
    at = workbench.under(merge_weighting=weighting)
    arrivals = [at.arrival(f"c{i}", row, at.base) for i, row in enumerate(rows)]
    after, _ = at.merge(at.base, arrivals)
    deltas = [
        (10.0 + len(row), read_tensors(it.path)) for row, it in zip(rows, arrivals, strict=True)
    ]
    result = at.tensors(after)
    for name, base in at.tensors(at.base).items():
        total, weights = np.zeros(base.shape), 0.0
        for num_examples, delta in deltas:
            if name in delta:
                weight = num_examples if weighting == "num_examples" else 1.0
                total += weight * delta[name].astype(np.float64)
                weights += weight
        expected = base if weights == 0 else (base.astype(np.float64) + total / weights)
        assert result[name].tobytes() == expected.astype(np.float32).tobytes()


def test_a_delta_that_is_not_what_it_was_admitted_as_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "delta"
    path.write_bytes(serialize_tensors({"head/a": np.ones(4, np.float32)}))
    weights = {"head": 1.0}
    assert sum_deltas({"head/a": 4}, [WeightedDelta(path, weights)]).tolist() == [1.0] * 4
    for sizes in ({"head/b": 4}, {"head/a": 5}):
        with pytest.raises(ValueError, match="head/"):
            sum_deltas(sizes, [WeightedDelta(path, weights)])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="shorter"):
        sum_deltas({"head/a": 4}, [WeightedDelta(path, weights)])
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match="header"):
        sum_deltas({"head/a": 4}, [WeightedDelta(path, weights)])


def test_tensors_of_a_foreign_order_are_summed_by_name(tmp_path: Path) -> None:
    """Safetensors may hold tensors in any order; only names decide."""
    first, second = np.arange(3, dtype="<f4"), np.arange(10, 12, dtype="<f4")
    header = (
        b'{"layers.0/b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"layers.0/a":{"dtype":"F32","shape":[3],"data_offsets":[8,20]}}'
    )
    path = tmp_path / "delta"
    path.write_bytes(
        len(header).to_bytes(8, "little") + header + second.tobytes() + first.tobytes()
    )
    sizes = {"layers.0/a": 3, "layers.0/b": 2, "layers.1/a": 1}
    total = sum_deltas(sizes, [WeightedDelta(path, {"layers.0": 2.0})] * 2)
    assert total.tolist() == [0, 4, 8, 40, 44, 0]
