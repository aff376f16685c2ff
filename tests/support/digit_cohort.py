"""Ten sites with real handwritten digits that tune a small residual network, some of them hostile.

The server's way is the product's own, in this process: planning, admission, screening, merging
and records. The network has four layers with adapters and a head as a registered model has; the
steps of all sites are taken side by side, which takes milliseconds instead of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from fedra_edge.protocol.ids import AssignmentId, ClientId, RunId, UploadId
from fedra_edge.protocol.layers import TensorKey
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.slices import TrainingSpec
from fedra_edge.protocol.tensors import FloatArray, read_tensors, serialize_tensors
from fedra_server.publishing import initial_revision
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.records import (
    AssignmentRecord,
    RunRecord,
    UploadRecord,
)
from tests.support.builders import NOW, RUN, make_delta, make_model_spec, make_run_spec
from tests.support.headless import Headless

SITES: Final = 10
STEPS: Final = 12
"""Of each site in each round."""
LAYERS: Final = 4
_LABELS, _PIXELS, _WIDTH, _TARGET = 10, 64, 48, "mlp.fc2"
_KNOWN, _HELD_OUT = 600, 400
_UPRIGHT = 20
_PRETRAINING_STEPS = 400
_ALPHA, _RANK = 16.0, 8
_REST_S: Final = 601.0

Tensors = dict[str, FloatArray]
Attack = Callable[[Tensors, np.random.Generator], Tensors]
Turn = Callable[[NDArray[np.float32]], NDArray[np.float32]]


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


def unaltered(delta: Tensors, _: np.random.Generator) -> Tensors:
    """Send the delta, which was trained with labels that are exchanged."""
    return delta


TURNS: Final[Mapping[str, Turn]] = {
    "rotated": lambda images: np.rot90(images, axes=(1, 2)),
    "mirrored": lambda images: images[:, :, ::-1],
    "inverted": lambda images: -images,
    "shifted": lambda images: np.roll(images, 2, axis=2),
}
"""What the digits that the model was made for look like, each otherwise than the sites' own."""


@dataclass(frozen=True)
class Digits:
    """What the sites have and what is held out, and a network made for digits that look otherwise.

    ``network`` has the frozen weights of stem and layers, and the first ones of the head.
    """

    images: Tensor
    targets: Tensor
    network: dict[str, Tensor]
    seed: int

    def shares(self, concentration: float) -> list[NDArray[np.int64]]:
        """Deal the sites' examples, with a mix of labels of each site's own."""
        generator = np.random.default_rng([1, self.seed])
        targets = self.targets[:-_HELD_OUT].numpy()
        owners = np.empty(len(targets), dtype=int)
        for label in range(_LABELS):
            of_label = np.flatnonzero(targets == label)
            chances = generator.dirichlet(np.full(SITES, concentration))
            owners[of_label] = generator.choice(SITES, len(of_label), p=chances)
        for site in range(SITES):  # whoever got nothing has one example
            if not (owners == site).any():
                owners[generator.integers(len(owners))] = site
        return [np.flatnonzero(owners == site) for site in range(SITES)]


@cache
def load(seed: int, turn: str) -> Digits:
    """Divide the digits, and train a network on those of them that are turned."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = digits.images[order].astype(np.float32) / 8 - 1
    targets = torch.from_numpy(digits.target[order].astype(np.int64))
    turned = images[:_KNOWN].copy()
    turned[_UPRIGHT:] = TURNS[turn](turned[_UPRIGHT:])
    turned = turned.reshape(-1, _PIXELS)
    network = _pretrained(torch.from_numpy(turned), targets[:_KNOWN], seed)
    rest = torch.from_numpy(images[_KNOWN:].reshape(-1, _PIXELS))
    return Digits(rest, targets[_KNOWN:], network, seed)


def _pretrained(images: Tensor, targets: Tensor, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"stem": (_WIDTH, _PIXELS), "head/classifier.weight": (_LABELS, _WIDTH)}
    shapes |= {f"layers.{layer}": (_WIDTH, _WIDTH) for layer in range(LAYERS)}
    network = {
        name: torch.randn(shape, generator=generator) / shape[1] ** 0.5
        for name, shape in shapes.items()
    }
    network["head/classifier.bias"] = torch.zeros(_LABELS)
    leaves = [it.requires_grad_() for it in network.values()]
    optimizer = torch.optim.AdamW(leaves, lr=3e-3)
    for _ in range(_PRETRAINING_STEPS):
        chosen = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(_logits(network, network, images[chosen]), targets[chosen]).backward()  # type: ignore[no-untyped-call]  # unannotated
        optimizer.step()
    return {name: it.detach() for name, it in network.items()}


def _logits(network: Mapping[str, Tensor], trained: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Map inputs, of one site or of several side by side, to logits."""
    hidden = inputs @ network["stem"].mT
    for layer in range(LAYERS):
        seen = F.layer_norm(hidden, (_WIDTH,))
        values = seen @ network[f"layers.{layer}"].mT
        name = f"layers.{layer}/{_TARGET}"
        if f"{name}.lora_a" in trained:
            low = seen @ trained[f"{name}.lora_a"].mT
            values = values + _ALPHA / _RANK * (low @ trained[f"{name}.lora_b"].mT)
        hidden = hidden + F.relu(values)
    bias = trained["head/classifier.bias"]
    seen = F.layer_norm(hidden, (_WIDTH,))
    return seen @ trained["head/classifier.weight"].mT + bias.unsqueeze(-2)


@dataclass
class DigitCohort:
    """A server and its sites; the last ``attackers`` of them alter what they send or learn."""

    server: Headless
    spec: ModelSpec
    digits: Digits
    shares: list[NDArray[np.int64]]
    attackers: int = 0
    attack: Attack = unaltered
    delivered: list[tuple[int, AssignmentId]] = field(default_factory=list)

    def tune(self) -> float:
        """Play all rounds; give the accuracy on the held-out digits."""
        for number in range(1, self.run.spec.rounds + 1):
            self.server.clock.time += _REST_S
            for site in range(SITES):
                self.server.store.touch(_client_id(site), self.server.clock.now())
            self.server.coordinator.advance()
            pending = {
                int(client_id.removeprefix("site-")): assignment
                for client_id, assignment in self.server.assignments(number).items()
                if assignment.state is AssignmentState.PENDING
            }
            deltas = self._train(number)
            for site, assignment in pending.items():
                self._deliver(site, assignment, deltas)
            self.server.coordinator.advance()
            assert self.server.store.revision(RUN).manifest.number >= number
        return self.accuracy()

    @property
    def run(self) -> RunRecord:
        return self.server.store.run(RUN)

    def accuracy(self) -> float:
        """Evaluate the newest revision."""
        trained = {name: torch.from_numpy(it) for name, it in self._revision().items()}
        held_out, labels = self.digits.images[-_HELD_OUT:], self.digits.targets[-_HELD_OUT:]
        found = _logits(self.digits.network, trained, held_out).argmax(-1)
        return float((found == labels).float().mean())

    def held(self) -> tuple[float, float]:
        """Say how many per cent of honest and of hostile deltas had something quarantined."""
        held: dict[bool, list[bool]] = {False: [], True: []}
        for site, assignment_id in self.delivered:
            rows = self.server.store.screenings_of(assignment_id)
            held[site >= SITES - self.attackers].append(any(it.is_held for it in rows))
        honest, hostile = (100 * sum(it) / max(len(it), 1) for it in held.values())
        return honest, hostile

    def _revision(self) -> Tensors:
        manifest = self.server.store.revision(RUN).manifest
        tensors: Tensors = {}
        for blob in (*manifest.layers, manifest.head):
            tensors |= read_tensors(self.server.blobs.path(blob.sha256))
        return tensors

    def _train(self, number: int) -> dict[str, FloatArray]:
        """Take the steps of all sites side by side; give what changed, a row for each site."""
        base = {
            name: torch.from_numpy(it).expand(SITES, *it.shape)
            for name, it in self._revision().items()
        }
        trained = {name: it.clone().requires_grad_() for name, it in base.items()}
        rules, generator = self.run.spec.training, np.random.default_rng([number, self.digits.seed])
        moments = {name: torch.zeros_like(it) for name, it in trained.items()}
        for _ in range(STEPS):
            inputs, targets = self._batch(rules, generator)
            logits = _logits(self.digits.network, trained, inputs)
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            gradients = torch.autograd.grad(losses / rules.batch_size, list(trained.values()))
            with torch.no_grad():
                lengths = torch.cat([it.flatten(1) for it in gradients], 1).norm(dim=1)
                clipped = (rules.clip_norm / lengths).clamp(max=1.0)
                for (name, values), gradient in zip(trained.items(), gradients, strict=True):
                    factor = clipped.view(-1, *[1] * (values.dim() - 1))
                    moments[name] = rules.momentum * moments[name] + factor * gradient
                    values.sub_(rules.learning_rate * moments[name])
        return {name: (it.detach() - base[name]).numpy() for name, it in trained.items()}

    def _batch(self, rules: TrainingSpec, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        drawn = np.stack([generator.choice(share, rules.batch_size) for share in self.shares])
        targets = self.digits.targets[drawn]
        if self.attackers and self.attack is unaltered:
            targets[-self.attackers :] = _LABELS - 1 - targets[-self.attackers :]
        return self.digits.images[drawn], targets

    def _deliver(self, site: int, assignment: AssignmentRecord, deltas: Tensors) -> None:
        layer_ids = assignment.manifest.trained_layer_ids
        wanted = self.spec.delta_shapes(assignment.manifest.adapter, layer_ids)
        delta = {name: deltas[name][site] for name in wanted}
        if site >= SITES - self.attackers:
            delta = self.attack(delta, np.random.default_rng([site, assignment.round_number]))
        data = serialize_tensors(delta)
        upload_id = UploadId(f"upload-{assignment.assignment_id}")
        part = self.server.home.upload_part(upload_id)
        part.write_bytes(data)
        manifest = make_delta(
            assignment.assignment_id,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            num_examples=len(self.shares[site]),
        )
        upload = UploadRecord(
            upload_id, assignment.assignment_id, assignment.client_id, manifest, NOW
        )
        self.server.coordinator.intake.admit(upload, part)
        self.delivered.append((site, assignment.assignment_id))


def _client_id(site: int) -> ClientId:
    return ClientId(f"site-{site}")


@contextmanager
def digit_cohort(
    directory: Path,
    digits: Digits,
    run: Mapping[str, object],
    *,
    concentration: float,
    attackers: int = 0,
    attack: Attack = unaltered,
) -> Iterator[DigitCohort]:
    """Have a server with the network, a run and ten sites for the length of a block."""
    server = Headless(directory)
    try:
        head = {name: it.numpy() for name, it in digits.network.items() if "head/" in name}
        plain = {TensorKey.parse(name).name: it for name, it in head.items()}
        spec = make_model_spec(
            LAYERS,
            labels=tuple("0123456789"),
            block_linears={_TARGET: (_WIDTH, _WIDTH)},
            default_targets=(_TARGET,),
            head_parameters={name: it.shape for name, it in plain.items()},
        )
        weights = server.blobs.put_bytes(serialize_tensors(plain))
        spec = spec.model_copy(update={"head": spec.head.model_copy(update={"weights": weights})})
        server.store.add_model(spec, NOW)
        standard = {
            "adapter": {"rank": _RANK, "alpha": _ALPHA, "targets": (_TARGET,)},
            "min_participants": SITES, "deadline_s": 7 * 86_400, "merge_weighting": "uniform",
        }  # fmt: skip
        run_spec = make_run_spec(**{**standard, **run})
        record = RunRecord(RunId(RUN), spec.model_id, run_spec, RunState.RUNNING, NOW)
        server.store.add_run(
            record, initial_revision(spec, record.run, run_spec, server.blobs, NOW)
        )
        for site in range(SITES):
            server.enrol(_client_id(site), memory_bytes=2**40, baseline_bytes=10**8)
        yield DigitCohort(server, spec, digits, digits.shares(concentration), attackers, attack)
    finally:
        server.store.close()
