"""From a manifest to checked local work, and what is refused on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedra_edge.errors import SliceError
from fedra_edge.protocol.ids import ModelId
from fedra_edge.protocol.layers import TensorKey
from fedra_edge.protocol.models import AdapterSpec, BlobRef
from fedra_edge.protocol.rounds import EvaluationTask
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import serialize_tensors
from fedra_edge.slicing import materialize, whole_model
from tests.support.tiny_vit import ADAPTER, TinyVit


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyVit:
    return TinyVit.register(tmp_path_factory.mktemp("tiny"))


@dataclass
class CountingFiles:
    """A layer cache that remembers what it was asked for."""

    tiny: TinyVit
    asked: list[BlobRef] = field(default_factory=list)

    def path(self, ref: BlobRef, /) -> Path:
        self.asked.append(ref)
        return self.tiny.files.path(ref)


def with_blob(tiny: TinyVit, layer_id: int, data: bytes) -> SliceManifest:
    """Name other bytes as the adapter state of one layer."""
    layers = list(tiny.revision.layers)
    layers[layer_id] = tiny.blobs.put_bytes(data)
    revision = tiny.revision.model_copy(update={"layers": tuple(layers)})
    return tiny.manifest([1, 2], depth="reduced", revision=revision)


def state_of(tiny: TinyVit, layer_id: int) -> dict[str, np.ndarray]:
    return {
        name: value
        for name, value in tiny.adapters.items()
        if TensorKey.parse(name).layer_id == layer_id
    }


def test_a_reduced_slice_fetches_its_own_layers_only(tiny: TinyVit) -> None:
    files = CountingFiles(tiny)
    work = materialize(tiny.manifest([0, 2], depth="reduced"), tiny.spec, files)
    assert work.weights.keys() == {"stem", "layers.0", "layers.2", "head"}
    assert {TensorKey.parse(name).layer_id for name in work.adapters} == {0, 2, None}
    assert tiny.spec.layers[1].weights not in files.asked
    assert tiny.revision.layers[3] not in files.asked


def test_a_full_slice_has_every_layer_with_its_adapters(tiny: TinyVit) -> None:
    work = materialize(tiny.manifest([2]), tiny.spec, tiny.files)
    assert len(work.weights) == tiny.spec.num_layers + 2
    assert work.adapters.keys() == tiny.adapters.keys()
    for name, value in work.adapters.items():
        np.testing.assert_array_equal(value, tiny.adapters[name])


def test_a_whole_model_fetches_weights_only_when_they_are_looked_up(tiny: TinyVit) -> None:
    files = CountingFiles(tiny)
    task = EvaluationTask(
        run="run",
        model_id=ModelId(tiny.spec.model_id),
        revision=tiny.revision,
        adapter=ADAPTER,
    )
    model = whole_model(task, tiny.spec, files)
    assert len(model.weights) == tiny.spec.num_layers + 2
    assert set(model.weights) >= {"stem", "head", "layers.3"}
    assert tiny.spec.layers[1].weights not in files.asked
    assert model.weights["layers.1"].path == tiny.files.path(tiny.spec.layers[1].weights)
    assert tiny.spec.layers[1].weights in files.asked


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_id": "0" * 64}, "is for model"),
        ({"layers": [{"layer_id": 9, "role": "train"}], "depth": "reduced"}, "layer 9"),
        ({"layers": [{"layer_id": 1, "role": "train"}]}, "full depth"),
        ({"adapter": AdapterSpec(targets=("proj",))}, "'proj' is no linear module"),
        ({"adapter": ADAPTER.model_copy(update={"rank": 5})}, "not F32"),
    ],
    ids=["model", "layer", "depth", "target", "rank"],
)
def test_a_manifest_that_does_not_fit_the_model_is_refused(
    tiny: TinyVit, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SliceError, match=reason):
        materialize(tiny.manifest([1], **change), tiny.spec, tiny.files)


def test_a_revision_of_another_depth_is_refused(tiny: TinyVit) -> None:
    revision = tiny.revision.model_copy(update={"layers": tiny.revision.layers[:3]})
    with pytest.raises(SliceError, match="3 layers"):
        materialize(tiny.manifest([1], revision=revision), tiny.spec, tiny.files)


def test_damaged_adapter_states_are_refused(tiny: TinyVit) -> None:
    state = state_of(tiny, 2)
    name = next(iter(state))
    fewer = {key: value for key, value in state.items() if key != name}
    cases = {
        "missing": fewer,
        "extra": state | {"layers.2/other.lora_a": state[name]},
        "another layer": state_of(tiny, 3),
        "shape": state | {name: state[name].T},
        "dtype": state | {name: state[name].astype(np.float64)},
    }
    for tensors in cases.values():
        with pytest.raises(SliceError, match="layer 2"):
            materialize(with_blob(tiny, 2, serialize_tensors(tensors)), tiny.spec, tiny.files)
    with pytest.raises(SliceError, match="no tensor file"):
        materialize(with_blob(tiny, 2, b"not tensors at all"), tiny.spec, tiny.files)
