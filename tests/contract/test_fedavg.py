"""Everybody at all layers with equal weights: a run is plain FedAvg of LoRA (invariant 3).

The reference is written with transformers, peft and torch.optim alone: every client trains a
copy of the global model on its own batches, and the copies' trained tensors are averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.deltas import compute_delta, pack_delta
from fedra_edge.protocol.ids import AssignmentId, RunId
from fedra_edge.protocol.layers import TensorKey
from fedra_edge.protocol.slices import Residency, TrainingSpec
from fedra_edge.protocol.tensors import FloatArray, read_tensors
from fedra_edge.slicing import materialize
from fedra_edge.training.sampling import draw_batches
from fedra_edge.training.torch_trainer import TorchTrainer
from fedra_server.merging import Contributor
from fedra_server.publishing import Arrival, merged_revision, trained_pieces
from fedra_server.storage.records import RevisionRecord
from tests.support.builders import make_run_spec
from tests.support.surroundings import room_for
from tests.support.tiny_vit import (
    ADAPTER,
    NUM_LAYERS,
    NoiseImages,
    TinyVit,
    noise_data,
    reference_parameter,
)

CLIENTS = (0, 1, 2)
ROUNDS = 3
STEPS = 4
TRAINING = TrainingSpec(batch_size=4, learning_rate=0.05)
LAYERS = range(NUM_LAYERS)


def local_data(client: int) -> MatchedDataset:
    """Give every client other examples, and other numbers of them."""
    data = noise_data(30)
    mine = tuple(index for index in data.train_indices if index % len(CLIENTS) == client % 2)
    assert isinstance(data.dataset, NoiseImages)
    return MatchedDataset(data.dataset, mine[: 8 - client], (), data.label_ids)


def seed_of(round_number: int, client: int) -> int:
    return 100 * round_number + client


def our_run(tiny: TinyVit, directory: Path, residency: Residency) -> Mapping[str, FloatArray]:
    """Run the project's own stages: materialize, train, delta, merge, publish."""
    run_spec = make_run_spec(adapter=ADAPTER, merge_weighting="uniform")
    pieces = NUM_LAYERS + 1
    revision = RevisionRecord(
        RunId("run"), tiny.revision, (0,) * NUM_LAYERS, 0.0, (0,) * pieces, (None,) * pieces
    )
    for round_number in range(1, ROUNDS + 1):
        arrivals = []
        for client in CLIENTS:
            manifest = tiny.manifest(
                LAYERS, training=TRAINING, steps=STEPS, seed=seed_of(round_number, client),
                micro_batch=2, residency=residency, revision=revision.manifest,
            )  # fmt: skip
            work = materialize(manifest, tiny.spec, tiny.files)
            trained = TorchTrainer(torch.device("cpu")).train(
                work, local_data(client), room_for(work)
            )
            path = directory / f"{round_number}-{client}.safetensors"
            path.write_bytes(b"".join(pack_delta(compute_delta(work.adapters, trained.adapters))))
            contributor = Contributor(AssignmentId(str(client)), trained.num_examples, 1.0)
            pieces_trained = trained_pieces(manifest.trained_layer_ids)
            arrivals.append(Arrival(contributor, pieces_trained, revision.versions, path))
        revision, _ = merged_revision(revision, arrivals, run_spec, tiny.blobs, now=0.0)
    blobs = (*revision.manifest.layers, revision.manifest.head)
    tensors: dict[str, FloatArray] = {}
    for blob in blobs:
        tensors |= read_tensors(tiny.blobs.path(blob.sha256))
    return tensors


def plain_fedavg(tiny: TinyVit) -> Mapping[str, torch.Tensor]:
    """Run FedAvg of LoRA the way a textbook would write it."""
    positions = {layer: layer for layer in LAYERS}
    state = {name: torch.tensor(value) for name, value in tiny.adapters.items()}
    for round_number in range(1, ROUNDS + 1):
        local = []
        for client in CLIENTS:
            model = tiny.reference(LAYERS)
            mine = {
                name: reference_parameter(model, TensorKey.parse(name), positions) for name in state
            }
            with torch.no_grad():
                for name, parameter in mine.items():
                    parameter.copy_(state[name])
            optimizer = torch.optim.SGD(
                mine.values(), lr=TRAINING.learning_rate, momentum=TRAINING.momentum,
                weight_decay=TRAINING.weight_decay,
            )  # fmt: skip
            data = local_data(client)
            seed = seed_of(round_number, client)
            for batch in draw_batches(data.train_indices, TRAINING.batch_size, STEPS, seed):
                images, labels = data.batch(batch, tiny.spec.input)
                logits = model(torch.from_numpy(images)).logits
                optimizer.zero_grad()
                F.cross_entropy(logits, torch.from_numpy(labels)).backward()  # type: ignore[no-untyped-call]  # unannotated
                torch.nn.utils.clip_grad_norm_(mine.values(), TRAINING.clip_norm)
                optimizer.step()
            local.append({name: parameter.detach() for name, parameter in mine.items()})
        state = {name: torch.stack([one[name] for one in local]).mean(dim=0) for name in state}
    return state


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_run_of_full_budgets_is_plain_fedavg(tmp_path: Path, residency: Residency) -> None:
    tiny = TinyVit.register(tmp_path)
    ours, expected = our_run(tiny, tmp_path, residency), plain_fedavg(tiny)
    assert ours.keys() == expected.keys()
    moved = 0.0
    for name, value in ours.items():
        np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-4, atol=1e-5)
        moved = max(moved, float(np.abs(value - tiny.adapters[name]).max()))
    assert moved > 0.01
