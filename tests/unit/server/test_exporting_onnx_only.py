"""What was tuned of a model that is only there as ONNX is exported, fused and in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from fedra_edge.evaluation import evaluate_export
from fedra_edge.protocol.layers import HEAD, STEM, TensorKey, layer_piece
from fedra_edge.protocol.models import AdapterSpec, BlobRef, ModelSpec
from fedra_edge.protocol.slices import RevisionManifest
from fedra_edge.protocol.tensors import FloatArray, read_tensors
from fedra_edge.training import load_trainer
from fedra_server.exporting import export_onnx, export_revision
from fedra_server.modelbook.graphs.running import run_graph
from fedra_server.modelbook.importing.inputs import Preparation
from fedra_server.modelbook.importing.registering import register_onnx
from fedra_server.storage.blobs import BlobStore
from tests.support.onnx_models import build_model, export_model
from tests.support.tiny_vit import LABELS, noise_data, put_revision, random_tensors

PREPARATION = Preparation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Tuned:
    """A registered model and a revision that changes it, its adapters on square weights too."""

    spec: ModelSpec
    blobs: BlobStore
    adapter: AdapterSpec
    revision: RevisionManifest
    adapters: dict[str, FloatArray]

    def piece(self, piece: str, ref: BlobRef) -> dict[str, NDArray[Any]]:
        held = read_tensors(self.blobs.path(ref.sha256))
        tuned = {TensorKey.parse(name): value for name, value in self.adapters.items()}
        return held | {key.name: value for key, value in tuned.items() if key.piece == piece}

    def walk(self, inputs: NDArray[Any]) -> FloatArray:
        """Compute logits piece by piece, with the adapters beside the weights."""
        spec, graphs = self.spec, self.spec.graphs
        assert graphs is not None
        stem, block, head = (
            onnx.load_model_from_string(self.blobs.path(ref.sha256).read_bytes())
            for ref in (graphs.stem, graphs.block, graphs.head)
        )
        scale = {"lora_scale": np.array(self.adapter.scale, np.float32)}
        values = run_graph(stem, {"inputs": inputs, **self.piece(STEM, spec.stem.weights)})
        for layer_id in spec.layer_ids:
            piece = layer_piece(layer_id)
            weights = self.piece(piece, spec.layers[layer_id].weights)
            values["hidden"] = run_graph(block, {**values, **weights, **scale})["out"]
        logits: FloatArray
        logits = run_graph(head, {**values, **self.piece(HEAD, spec.head.weights)})["logits"]
        return logits


@pytest.fixture(scope="module", params=[True, False], ids=["dynamo", "torchscript"])
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    place = tmp_path_factory.mktemp("mixer")
    path = export_model(build_model("mixer"), place / "mixer.onnx", dynamo=request.param)
    blobs = BlobStore(place / "blobs")
    spec = register_onnx(path, "mixer", LABELS, PREPARATION, blobs)
    adapter = AdapterSpec(rank=2, alpha=4.0, targets=spec.default_targets)
    adapters = random_tensors(spec.delta_shapes(adapter, spec.layer_ids))
    return Tuned(spec, blobs, adapter, put_revision(spec, adapters, blobs), adapters)


def test_the_fused_model_computes_what_the_pieces_do(tuned: Tuned, tmp_path: Path) -> None:
    out = tmp_path / "fused"
    export_onnx(tuned.spec, tuned.adapter, tuned.revision, tuned.blobs, out)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    for number in (1, 4):
        inputs = np.random.default_rng(number).normal(size=(number, 3, 16, 16))
        feed = inputs.astype(np.float32)
        [logits] = session.run(["logits"], {"inputs": feed})
        np.testing.assert_allclose(logits, tuned.walk(feed), rtol=1e-4, atol=1e-4)


def test_an_ordinary_export_is_evaluated_on_onnxruntime(tuned: Tuned, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    export_revision(tuned.spec, tuned.adapter, tuned.revision, tuned.blobs, out)
    data = noise_data()
    counts = evaluate_export(out, data, load_trainer("onnx"))
    images, label_ids = data.batch(data.held_out_indices, tuned.spec.input)
    right = tuned.walk(images).argmax(1) == label_ids
    assert (counts.num_examples, counts.num_correct) == (len(right), int(right.sum()))
    assert not (out / "base" / "config.json").exists()
    assert "transformers" not in (out / "README.md").read_text(encoding="utf-8")
