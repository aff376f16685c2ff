"""Ten sites with real handwritten digits that tune a tiny vision transformer, some of them hostile.

Model, local training, admission, screening, merging and records are the product's own, in this
process; only the way over the network is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from fedra_edge.data.dataset import Example
from fedra_edge.data.matching import MatchedDataset, match_labels
from fedra_edge.deltas import compute_delta
from fedra_edge.protocol.ids import ClientId, RunId, UploadId
from fedra_edge.protocol.models import AdapterSpec, ModelSpec
from fedra_edge.protocol.rounds import EvaluationTask
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import FloatArray, serialize_tensors
from fedra_edge.slicing import materialize, whole_model
from fedra_edge.training.torch_trainer import TorchTrainer
from fedra_server.modelbook.registering import register_model
from fedra_server.publishing import initial_revision
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.records import AssignmentRecord, RunRecord, UploadRecord
from tests.support.builders import NOW, RUN, make_delta, make_run_spec
from tests.support.headless import Headless
from tests.support.surroundings import room_for
from tests.support.tiny_vit import BlobFiles

SITES: Final = 10
_LABELS: Final = tuple("0123456789")
_SIZE_PX, _PATCH_PX = 16, 4
_KNOWN, _HELD_OUT = 300, 400
_CONCENTRATION: Final = 1.0
_REST_S: Final = 601.0
_CPU: Final = torch.device("cpu")

Tensors = dict[str, FloatArray]
Attack = Callable[[Tensors, np.random.Generator], Tensors]


def multiplied(factor: float) -> Attack:
    """Send the honest delta times a factor."""
    return lambda delta, _: {name: np.float32(factor) * it for name, it in delta.items()}


def noise(factor: float) -> Attack:
    """Send random values, so many times as large as the honest ones."""

    def attack(delta: Tensors, generator: np.random.Generator) -> Tensors:
        return {
            name: generator.normal(0, factor * float(np.std(it)) + 1e-6, it.shape).astype("f4")
            for name, it in delta.items()
        }

    return attack


ATTACKS: Final[Mapping[str, Attack]] = {
    "signs flipped": multiplied(-1),
    "times -10": multiplied(-10),
    "times 100": multiplied(100),
    "noise, 10 times as long": noise(10),
}


class _Digits:
    """Digits by index, as images of the model's size."""

    def __init__(self, images: NDArray[np.uint8], targets: NDArray[np.int64]) -> None:
        self._images, self._targets = images, targets

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], self.label_of(index))

    def label_of(self, index: int) -> str:
        return str(self._targets[index])

    def key_of(self, index: int) -> str:
        return str(index)

    def is_held_out(self, index: int) -> bool | None:
        return index >= len(self) - _HELD_OUT


@dataclass(frozen=True)
class Digits:
    """All examples in a fixed random order: those the model knows, the sites', the held-out."""

    images: NDArray[np.uint8]
    targets: NDArray[np.int64]

    @classmethod
    def load(cls) -> Digits:
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        small = np.round(digits.images[order] * 255 / 16).astype(np.uint8)
        large = small.repeat(_SIZE_PX // 8, axis=1).repeat(_SIZE_PX // 8, axis=2)
        return cls(np.repeat(large[..., None], 3, axis=3), digits.target[order].astype(np.int64))

    def matched(self) -> MatchedDataset:
        return match_labels(_Digits(self.images, self.targets), _LABELS)

    def shares(self, concentration: float = _CONCENTRATION) -> list[tuple[int, ...]]:
        """Deal the sites' examples, with a mix of labels of each site's own."""
        generator = np.random.default_rng(1)
        mine = np.arange(_KNOWN, len(self.targets) - _HELD_OUT)
        owners = np.empty(len(mine), dtype=int)
        for label in range(len(_LABELS)):
            of_label = np.flatnonzero(self.targets[mine] == label)
            chances = generator.dirichlet(np.full(SITES, concentration))
            owners[of_label] = generator.choice(SITES, len(of_label), p=chances)
        return [tuple(int(it) for it in mine[owners == site]) for site in range(SITES)]


def save_model(digits: Digits, directory: Path) -> None:
    """Train a small transformer on the few digits that it knows, and save it."""
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        image_size=_SIZE_PX, patch_size=_PATCH_PX, hidden_dropout_prob=0.0,
        id2label=dict(enumerate(_LABELS)),
        label2id={label: index for index, label in enumerate(_LABELS)},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(config)
        images = torch.from_numpy(digits.images[:_KNOWN]).permute(0, 3, 1, 2).float()
        images, labels = images / 127.5 - 1, torch.from_numpy(digits.targets[:_KNOWN])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            for part in torch.split(torch.randperm(_KNOWN), 50):
                optimizer.zero_grad()
                F.cross_entropy(model(images[part]).logits, labels[part]).backward()  # type: ignore[no-untyped-call]  # unannotated
                optimizer.step()
    model.save_pretrained(directory)


@dataclass
class DigitCohort:
    """A server and its sites; the last ``attackers`` of them alter what they send."""

    server: Headless
    spec: ModelSpec
    digits: Digits
    data: MatchedDataset
    shares: list[tuple[int, ...]]
    trainer: TorchTrainer
    attackers: int = 0
    attack: Attack | None = None

    def tune(self) -> float:
        """Play all rounds; give the accuracy on the held-out digits."""
        for number in range(1, self.run.spec.rounds + 1):
            self.server.clock.time += _REST_S
            for site in range(SITES):
                self.server.store.touch(_client_id(site), self.server.clock.now())
            self.server.coordinator.advance()
            for client_id, assignment in self.server.assignments(number).items():
                if assignment.state is AssignmentState.PENDING:
                    self._deliver(ClientId(client_id), assignment)
            self.server.coordinator.advance()
            assert self.server.store.revision(RUN).manifest.number >= number
        return self.accuracy()

    @property
    def run(self) -> RunRecord:
        return self.server.store.run(RUN)

    def accuracy(self) -> float:
        """Evaluate the newest revision."""
        task = EvaluationTask(
            run=RUN,
            model_id=self.spec.model_id,
            revision=self.server.store.revision(RUN).manifest,
            adapter=self.run.spec.adapter,
        )
        model = whole_model(task, self.spec, BlobFiles(self.server.blobs))
        counts = self.trainer.evaluate(model, self.data, lambda: False, lambda: 2**50)
        return counts.num_correct / counts.num_examples

    def quarantined(self) -> set[int]:
        """Number the sites of which something is or was quarantined."""
        store = self.server.store
        held = {row.assignment_id for row in store.held_screenings(RUN)}
        return {int(store.assignment(it).client_id.removeprefix("site-")) for it in held}

    def _deliver(self, client_id: ClientId, assignment: AssignmentRecord) -> None:
        site = int(client_id.removeprefix("site-"))
        delta, num_examples = self._train(site, assignment.manifest)
        if site >= SITES - self.attackers and self.attack is not None:
            delta = self.attack(delta, np.random.default_rng([site, assignment.round_number]))
        data = serialize_tensors(delta)
        upload_id = UploadId(f"upload-{assignment.assignment_id}")
        part = self.server.home.upload_part(upload_id)
        part.write_bytes(data)
        manifest = make_delta(
            assignment.assignment_id,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            num_examples=num_examples,
        )
        upload = UploadRecord(upload_id, assignment.assignment_id, client_id, manifest, NOW)
        self.server.coordinator.intake.admit(upload, part)

    def _train(self, site: int, manifest: SliceManifest) -> tuple[Tensors, int]:
        mine = MatchedDataset(self.data.dataset, self.shares[site], (), self.data.label_ids)
        work = materialize(manifest, self.spec, BlobFiles(self.server.blobs))
        trained = self.trainer.train(work, mine, room_for(work))
        return compute_delta(work.adapters, trained.adapters), trained.num_examples


def _client_id(site: int) -> ClientId:
    return ClientId(f"site-{site}")


@contextmanager
def digit_cohort(
    directory: Path,
    saved: Path,
    run: Mapping[str, object],
    *,
    attackers: int = 0,
    attack: Attack | None = None,
    concentration: float = _CONCENTRATION,
) -> Iterator[DigitCohort]:
    """Have a server with the saved model, a run and ten sites for the length of a block."""
    digits, server = Digits.load(), Headless(directory)
    try:
        spec = register_model(saved, "digits", server.blobs)
        server.store.add_model(spec, NOW)
        adapter = AdapterSpec(rank=8, alpha=16.0, targets=spec.default_targets)
        standard = {
            "adapter": adapter, "min_participants": SITES, "deadline_s": 7 * 86_400,
            "merge_weighting": "uniform", "max_layers": 3,
            "training": {"learning_rate": 0.05, "batch_size": 16, "local_epochs": 2},
        }  # fmt: skip
        run_spec = make_run_spec(**{**standard, **run})
        record = RunRecord(RunId(RUN), spec.model_id, run_spec, RunState.RUNNING, NOW)
        server.store.add_run(
            record, initial_revision(spec, record.run, run_spec, server.blobs, NOW)
        )
        shares = digits.shares(concentration)
        for site in range(SITES):
            server.enrol(_client_id(site), memory_bytes=2**40, baseline_bytes=10**8)
        yield DigitCohort(
            server, spec, digits, digits.matched(), shares, TorchTrainer(_CPU), attackers, attack
        )
    finally:
        server.store.close()
