"""A client process that makes a memory promise and keeps it, or not: the one under test.

``python -m tests.support.promised_training`` reads a ``Request`` as JSON from standard input; it
measures the machine, calibrates, fits, trains a slice as the server would plan it, and prints an
``Outcome``.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from fedra_edge.data.dataset import Example, TextExample
from fedra_edge.data.matching import MatchedDataset, match_labels
from fedra_edge.data.tokenizing import TextTokenizer
from fedra_edge.guard import PromiseGuard
from fedra_edge.memory_meter import measured_peak
from fedra_edge.profiling import (
    SiteCaps,
    measure_device,
    measure_usable_memory,
    unbacked_bytes,
)
from fedra_edge.protocol.devices import Backend, BlockMemory, Calibration
from fedra_edge.protocol.fitting import DepthPolicy, Machine, Terms, Work, fit_work
from fedra_edge.protocol.footprint import MemoryPlan, SliceShape
from fedra_edge.protocol.ids import AssignmentId, RevisionNumber, RoundNumber
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_edge.protocol.models import AdapterSpec, BlobRef, ImageInput, ModelSpec, TokenInput
from fedra_edge.protocol.slices import LayerRole, RevisionManifest, SliceManifest, TrainingSpec
from fedra_edge.slicing import find_graphs
from fedra_edge.training import load_trainer
from fedra_edge.training.trainer import SliceWork, Surroundings, Trainer

STEPS = 2
WORDS = ("the", "pump", "drips", "oil", "again", "since", "monday")


class Request(BaseModel):
    """What to train: a model by its spec and pieces, and which of its layers.

    ``memory_bytes`` is the site's own cap, beside the limits that the process runs under.
    """

    spec: ModelSpec
    pieces: Path
    scratch: Path
    batch_size: int
    num_examples: int
    depth: DepthPolicy
    optimizer: str
    rank: int
    max_layers: int
    seed: int
    memory_bytes: int | None = None
    backend: Backend = "torch"

    @property
    def training(self) -> TrainingSpec:
        return TrainingSpec.model_validate(
            {"optimizer": self.optimizer, "batch_size": self.batch_size, "max_steps": STEPS}
        )

    @property
    def adapter(self) -> AdapterSpec:
        return AdapterSpec(rank=self.rank, targets=self.spec.default_targets)

    @property
    def terms(self) -> Terms:
        return Terms(self.adapter, self.training, 1e6, self.depth, self.max_layers)

    def path(self, ref: BlobRef, /) -> Path:
        return self.pieces / ref.sha256[:2] / ref.sha256


class Outcome(BaseModel):
    """What was promised and what it took.

    ``unbacked_bytes`` is address space that the idle process has and does not occupy.
    """

    reason: str
    usable_bytes: int
    unbacked_bytes: int
    memory: BlockMemory
    predicted_bytes: int = 0
    measured_bytes: int = 0
    plan: MemoryPlan | None = None
    step_downs: tuple[str, ...] = ()
    first_loss: float = 0.0
    last_loss: float = 0.0


class Noise:
    """Random examples that cost no memory: each is drawn when it is looked at."""

    def __init__(self, spec: ModelSpec, size: int) -> None:
        self._spec, self._size = spec, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example | TextExample:
        wanted, generator = self._spec.input, np.random.default_rng(index)
        if isinstance(wanted, ImageInput):
            side_px = wanted.size_px
            image = generator.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
            return Example(image, self.label_of(index))
        words = generator.choice(WORDS, wanted.max_tokens).tolist()
        return TextExample(" ".join(words), self.label_of(index))

    def label_of(self, index: int) -> str:
        return self._spec.labels[index % len(self._spec.labels)]

    def key_of(self, index: int) -> str:
        return str(index)

    def is_held_out(self, _index: int) -> bool | None:
        return False


def slice_of(request: Request, work: Work, layers: tuple[LayerRole, ...]) -> SliceWork:
    """Make the planned slice ready, with random adapters."""
    spec, adapter = request.spec, request.adapter
    head = spec.head.weights
    manifest = SliceManifest(
        assignment_id=AssignmentId("promise"),
        run="promise",
        round_number=RoundNumber(1),
        model_id=spec.model_id,
        revision=RevisionManifest(
            number=RevisionNumber(0), layers=(head,) * spec.num_layers, head=head
        ),
        adapter=adapter,
        training=request.training,
        layers=layers,
        depth=work.depth,
        residency=work.plan.residency,
        micro_batch=work.plan.micro_batch,
        walk_batch=work.plan.walk_batch,
        steps=STEPS,
        seed=request.seed,
        remaining_s=3600.0,
        predicted_peak_bytes=work.predicted_peak_bytes,
    )
    generator = np.random.default_rng(request.seed)
    adapters = {
        name: generator.normal(0, 0.02, shape).astype(np.float32)
        for name, shape in spec.delta_shapes(adapter, manifest.layer_ids).items()
    }
    refs = {layer_piece(i): spec.layers[i].weights for i in manifest.layer_ids}
    refs |= {STEM: spec.stem.weights, HEAD: head}
    files = {piece: request.path(ref) for piece, ref in refs.items()}
    return SliceWork(spec, manifest, files, adapters, find_graphs(spec.graphs, request))


def run(request: Request) -> Outcome:
    """Do what a client does between joining and sending its delta."""
    trainer = load_trainer(request.backend)
    caps = SiteCaps(memory_bytes=request.memory_bytes)
    profile = measure_device(backend=trainer.backend, home=request.scratch, caps=caps)
    data = _data(request)
    calibration = _calibrated(trainer, request)
    outcome = Outcome(
        reason="",
        usable_bytes=profile.memory_bytes,
        unbacked_bytes=unbacked_bytes(),
        memory=calibration.memory,
    )
    machine = Machine(profile, calibration, request.spec, request.terms)
    fit = fit_work(profile, calibration, request.spec, request.terms)
    if not isinstance(fit, Work):
        return outcome.model_copy(update={"reason": fit.reason})
    layers = _drawn(request, fit)
    shape = SliceShape.of(layers)
    work = slice_of(request, machine.drawn(fit, shape), layers)
    usable_memory = partial(measure_usable_memory, caps, unbacked_bytes())
    guard = PromiseGuard(machine.footprint(shape), usable_memory)
    surroundings = Surroundings(
        on_step=lambda *_: None,
        should_stop=lambda: False,
        guard=guard,
        scratch=request.scratch,
        scratch_bytes=2**30,
    )
    with measured_peak() as meter:
        trained = trainer.train(work, data, surroundings)
    told = {
        "reason": fit.reason,
        "predicted_bytes": guard.promised_bytes,
        "measured_bytes": meter.peak_bytes,
        "plan": trained.plan,
        "step_downs": tuple(guard.step_downs),
        "first_loss": trained.first_loss,
        "last_loss": trained.last_loss,
    }
    return outcome.model_copy(update=told)


def _data(request: Request) -> MatchedDataset:
    spec, wanted = request.spec, request.spec.input
    tokenizer = None
    if isinstance(wanted, TokenInput):
        tokenizer = TextTokenizer(request.path(wanted.tokenizer), wanted)
    return match_labels(Noise(spec, request.num_examples), spec.labels, tokenizer)


def _calibrated(trainer: Trainer, request: Request) -> Calibration:
    cost = trainer.calibrate(
        request.spec,
        partial(measure_usable_memory, SiteCaps(memory_bytes=request.memory_bytes)),
        find_graphs(request.spec.graphs, request),
    )
    return Calibration(
        model_id=request.spec.model_id,
        forward_s=cost.forward_s,
        backward_s=cost.backward_s,
        memory=cost.memory,
        train_examples=request.num_examples,
        held_out_examples=0,
    )


def _drawn(request: Request, work: Work) -> tuple[LayerRole, ...]:
    generator = np.random.default_rng(request.seed)
    every = request.spec.layer_ids
    chosen = sorted(generator.choice(len(every), work.num_layers, replace=False).tolist())
    held = every if work.depth == "full" else tuple(every[i] for i in chosen)
    return tuple(
        LayerRole(layer_id=layer_id, role="train" if int(layer_id) in chosen else "frozen")
        for layer_id in held
    )


if __name__ == "__main__":
    print(run(Request.model_validate_json(sys.stdin.read())).model_dump_json())  # noqa: T201 - the answer
