"""A ViT-B/16 with random weights, registered once and kept in the cache, and slices of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from fedra_edge.protocol.ids import AssignmentId, LayerId, RevisionNumber, RoundNumber
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_edge.protocol.models import AdapterSpec, ModelSpec
from fedra_edge.protocol.slices import (
    Depth,
    LayerRole,
    Residency,
    RevisionManifest,
    SliceManifest,
    TrainingSpec,
)
from fedra_edge.training.trainer import SliceWork
from fedra_server.storage.blobs import BlobStore

NUM_LABELS: Final = 100
BATCH_SIZE: Final = 8
PLACE: Final = Path(__file__).parents[2] / ".cache" / "bench" / "vit-base-with-graphs"


def prepare() -> None:
    """Build and register the model when the cache lacks it; needs transformers."""
    if (PLACE / "spec.json").exists():
        return
    from transformers import ViTConfig, ViTForImageClassification

    from fedra_server.modelbook.registering import register_model

    labels = {index: f"class-{index}" for index in range(NUM_LABELS)}
    config = ViTConfig(id2label=labels, label2id={name: i for i, name in labels.items()})
    ViTForImageClassification(config).save_pretrained(PLACE / "hf")
    spec = register_model(PLACE / "hf", "vit-base", BlobStore(PLACE / "blobs"))
    (PLACE / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")


def slice_work(
    trained: Sequence[int], depth: Depth, residency: Residency, micro_batch: int
) -> SliceWork:
    """Make a slice ready that trains these layers, with random adapters."""
    spec = ModelSpec.model_validate_json((PLACE / "spec.json").read_text(encoding="utf-8"))
    blobs = BlobStore(PLACE / "blobs")
    adapter = AdapterSpec(targets=spec.default_targets)
    held = range(spec.num_layers) if depth == "full" else trained
    head = spec.head.weights
    manifest = SliceManifest(
        assignment_id=AssignmentId("bench"),
        run="bench",
        round_number=RoundNumber(1),
        model_id=spec.model_id,
        revision=RevisionManifest(
            number=RevisionNumber(0), layers=(head,) * spec.num_layers, head=head
        ),
        adapter=adapter,
        training=TrainingSpec(batch_size=BATCH_SIZE),
        layers=tuple(
            LayerRole(layer_id=LayerId(i), role="train" if i in trained else "frozen") for i in held
        ),
        depth=depth,
        residency=residency,
        micro_batch=micro_batch,
        walk_batch=BATCH_SIZE,
        steps=1,
        seed=0,
        remaining_s=3600.0,
        predicted_peak_bytes=0,
    )
    generator = np.random.default_rng(0)
    adapters = {
        name: generator.normal(0, 0.02, shape).astype(np.float32)
        for name, shape in spec.delta_shapes(adapter, manifest.layer_ids).items()
    }
    refs = {layer_piece(i): spec.layers[i].weights for i in manifest.layer_ids}
    refs |= {STEM: spec.stem.weights, HEAD: head}
    weights = {piece: blobs.path(ref.sha256) for piece, ref in refs.items()}
    assert spec.graphs is not None
    graphs = {name: blobs.path(ref.sha256) for name, ref in spec.graphs.by_name.items()}
    return SliceWork(spec, manifest, weights, adapters, graphs)
