"""Publishing: revision 0 changes nothing, merged revisions follow the formula, layer by layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedra_edge.protocol.ids import AssignmentId, LayerId, RunId
from fedra_edge.protocol.layers import LayerPositions
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.tensors import FloatArray, read_tensors, serialize_tensors
from fedra_server.merging import Contributor
from fedra_server.publishing import Arrival, initial_revision, merged_revision, trained_pieces
from fedra_server.runs import RunSpec
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import RevisionRecord
from tests.support.builders import make_model_spec, make_run_spec

LAYERS = 5


class Federation:
    """A blob store with a base revision, and honest clients that send random deltas."""

    def __init__(self, directory: Path, run_spec: RunSpec) -> None:
        self.directory = directory
        self.blobs = BlobStore(directory / "blobs")
        self.spec = self._store_head(make_model_spec(num_layers=LAYERS))
        self.run_spec = run_spec
        self.base = initial_revision(self.spec, RunId("run"), run_spec, self.blobs, now=1.0)

    def _store_head(self, spec: ModelSpec) -> ModelSpec:
        generator = np.random.default_rng(5)
        tensors = {
            name: generator.normal(size=shape).astype(np.float32)
            for name, shape in spec.head_parameters.items()
        }
        head = spec.head.model_copy(
            update={"weights": self.blobs.put_bytes(serialize_tensors(tensors))}
        )
        return spec.model_copy(update={"head": head})

    def delta(self, name: str, layers: list[int], num_examples: int, seed: int) -> Arrival:
        layer_ids = LayerPositions.of(layers).layer_ids
        generator = np.random.default_rng(seed)
        tensors = {
            key: generator.normal(size=shape).astype(np.float32)
            for key, shape in self.spec.delta_shapes(self.run_spec.adapter, layer_ids).items()
        }
        path = self.directory / f"{name}.safetensors"
        path.write_bytes(serialize_tensors(tensors))
        contributor = Contributor(AssignmentId(name), num_examples, len(layers) / LAYERS)
        pieces = trained_pieces(layer_ids)
        return Arrival(contributor, pieces, self.base.versions, path)

    def merge(self, arrivals: list[Arrival]) -> RevisionRecord:
        revision, _ = merged_revision(self.base, arrivals, self.run_spec, self.blobs, now=2.0)
        return revision

    def tensors(self, revision: RevisionRecord) -> dict[str, FloatArray]:
        manifest = revision.manifest
        tensors: dict[str, FloatArray] = {}
        for blob in (*manifest.layers, manifest.head):
            tensors |= read_tensors(self.blobs.path(blob.sha256))
        return tensors


def test_the_first_revision_changes_nothing_and_is_the_same_for_the_same_seed(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path, make_run_spec())
    again = initial_revision(
        federation.spec, RunId("run"), federation.run_spec, federation.blobs, now=9.0
    )
    assert again.manifest == federation.base.manifest
    tensors = federation.tensors(federation.base)
    shapes = federation.spec.delta_shapes(federation.run_spec.adapter, federation.spec.layer_ids)
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    for name, tensor in tensors.items():
        if name.endswith("lora_b"):
            assert not tensor.any()
        if name.endswith("lora_a"):
            assert 0 < np.abs(tensor).max() <= 1 / np.sqrt(tensor.shape[1])


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.sets(st.integers(0, LAYERS - 1), min_size=1), min_size=1, max_size=4),
    weighting=st.sampled_from(["uniform", "num_examples", "inverse_chance"]),
)
def test_a_merged_revision_equals_the_papers_formula_per_layer(
    tmp_path: Path, rows: list[set[int]], weighting: str
) -> None:
    federation = Federation(tmp_path, make_run_spec(merge_weighting=weighting))
    sent = [
        federation.delta(f"client-{index}", sorted(row), num_examples=10 + index, seed=index)
        for index, row in enumerate(rows)
    ]
    merged = federation.merge(sent[::-1])
    before, after = federation.tensors(federation.base), federation.tensors(merged)
    deltas = [read_tensors(arrival.path) for arrival in sent]
    for name, base in before.items():
        holders = [index for index, delta in enumerate(deltas) if name in delta]
        is_head = name.startswith("head/")
        weights = {
            "uniform": [1.0 for _ in holders],
            "num_examples": [10.0 + index for index in holders],
            "inverse_chance": [
                1.0 if is_head else min(LAYERS / len(rows[index]), 4.0) for index in holders
            ],
        }[weighting]
        if not holders:
            assert after[name].tobytes() == base.tobytes()
            continue
        mean = np.average([deltas[index][name] for index in holders], axis=0, weights=weights)
        np.testing.assert_allclose(after[name], base + mean, rtol=1e-5, atol=1e-6)


def test_an_untrained_layer_keeps_its_blob_and_its_last_round(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make_run_spec())
    merged = federation.merge([federation.delta("client", [1, 3], 10, seed=1)])
    unchanged = [
        layer for layer in range(LAYERS)
        if merged.manifest.layers[layer] == federation.base.manifest.layers[layer]
    ]  # fmt: skip
    assert unchanged == [0, 2, 4]
    assert merged.last_trained == (0, 1, 0, 1, 0)
    assert merged.versions == merged.manifest.versions == (0, 1, 0, 1, 0, 1)
    assert merged.manifest.number == 1
    assert merged.manifest.head != federation.base.manifest.head


def test_everybody_at_all_layers_and_equal_weights_is_plain_fedavg(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make_run_spec(merge_weighting="uniform"))
    everything = list(range(LAYERS))
    sent = [federation.delta(f"client-{i}", everything, 10, seed=i) for i in range(3)]
    after = federation.tensors(federation.merge(sent))
    before = federation.tensors(federation.base)
    trained = [
        {name: before[name] + delta for name, delta in read_tensors(item.path).items()}
        for item in sent
    ]
    for name, tensor in after.items():
        fedavg = np.mean([client[name] for client in trained], axis=0)
        np.testing.assert_allclose(tensor, fedavg, rtol=1e-5, atol=1e-6)


def test_arrival_order_leaves_no_trace_in_any_blob(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make_run_spec())
    sent = [federation.delta(f"client-{i}", [i, 4], 10, seed=i) for i in range(4)]
    assert federation.merge(sent).manifest == federation.merge(sent[::-1]).manifest


def test_a_blob_of_another_layer_is_never_merged_into(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make_run_spec())
    first, second, *rest = federation.base.manifest.layers
    swapped = federation.base.manifest.model_copy(update={"layers": (second, first, *rest)})
    wrong = replace(federation.base, manifest=swapped)
    delta = federation.delta("client", [LayerId(0)], 10, seed=1)
    with pytest.raises(ValueError, match=r"does not hold layers\.0"):
        merged_revision(wrong, [delta], federation.run_spec, federation.blobs, now=2.0)
