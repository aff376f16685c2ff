"""A client process that makes a memory promise and keeps it, or not: the one under test.

``python -m tests.support.promised_training`` reads a ``Request`` as JSON from standard input; it
measures the machine, calibrates, fits, trains a slice as the server would plan it, evaluates,
and prints an ``Outcome``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from fedra_edge.data.dataset import Example
from fedra_edge.data.matching import match_labels
from fedra_edge.guard import PromiseGuard
from fedra_edge.memory_meter import measured_peak
from fedra_edge.profiling import SiteCaps, measure_device, measure_usable_memory
from fedra_edge.protocol.devices import BlockMemory, Calibration
from fedra_edge.protocol.fitting import DepthPolicy, Machine, Terms, Work, fit_work
from fedra_edge.protocol.footprint import MemoryPlan, SliceShape
from fedra_edge.protocol.ids import AssignmentId, RevisionNumber, RoundNumber
from fedra_edge.protocol.layers import HEAD, STEM, layer_piece
from fedra_edge.protocol.models import AdapterSpec, ImageInput, ModelSpec
from fedra_edge.protocol.slices import LayerRole, RevisionManifest, SliceManifest, TrainingSpec
from fedra_edge.training import load_trainer
from fedra_edge.training.trainer import SliceWork, Surroundings

STEPS = 2


class Request(BaseModel):
    """What to train: a model by its spec and pieces, and which of its layers."""

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


class Outcome(BaseModel):
    """What was promised and what it took."""

    reason: str
    usable_bytes: int
    memory: BlockMemory
    predicted_bytes: int = 0
    measured_bytes: int = 0
    plan: MemoryPlan | None = None
    step_downs: tuple[str, ...] = ()
    first_loss: float = 0.0
    last_loss: float = 0.0


class NoiseImages:
    """Random images that cost no memory: each is drawn when it is looked at."""

    def __init__(self, size: int, labels: tuple[str, ...], side_px: int) -> None:
        self._size, self._labels, self._side_px = size, labels, side_px

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        generator = np.random.default_rng(index)
        image = generator.integers(0, 256, (self._side_px, self._side_px, 3), dtype=np.uint8)
        return Example(image, self.label_of(index))

    def label_of(self, index: int) -> str:
        return self._labels[index % len(self._labels)]

    def key_of(self, index: int) -> str:
        return str(index)

    def is_held_out(self, _index: int) -> bool | None:
        return False


def slice_of(
    request: Request, work: Work, adapter: AdapterSpec, layers: tuple[LayerRole, ...]
) -> SliceWork:
    """Make the planned slice ready, with random adapters."""
    spec = request.spec
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
        training=_training(request),
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
    files = {piece: request.pieces / ref.sha256[:2] / ref.sha256 for piece, ref in refs.items()}
    return SliceWork(spec, manifest, files, adapters)


def _training(request: Request) -> TrainingSpec:
    return TrainingSpec.model_validate(
        {"optimizer": request.optimizer, "batch_size": request.batch_size, "max_steps": STEPS}
    )


def run(request: Request) -> Outcome:
    """Do what a client does between joining and sending its delta."""
    spec = request.spec
    trainer = load_trainer()
    caps = SiteCaps(memory_bytes=request.memory_bytes)
    profile = measure_device(backend=trainer.backend, home=request.scratch, caps=caps)
    cost = trainer.calibrate(spec)
    calibration = Calibration(
        model_id=spec.model_id,
        forward_s=cost.forward_s,
        backward_s=cost.backward_s,
        memory=cost.memory,
        train_examples=request.num_examples,
        held_out_examples=0,
    )
    adapter = AdapterSpec(rank=request.rank, targets=spec.default_targets)
    terms = Terms(adapter, _training(request), 1e6, request.depth, request.max_layers)
    fit = fit_work(profile, calibration, spec, terms)
    usable_bytes = profile.memory_bytes
    if not isinstance(fit, Work):
        return Outcome(reason=fit.reason, usable_bytes=usable_bytes, memory=cost.memory)
    layers = _drawn(request, fit)
    machine = Machine(profile, calibration, spec, terms)
    shape = SliceShape.of(layers)
    drawn = machine.drawn(fit, shape)
    work = slice_of(request, drawn, adapter, layers)
    guard = PromiseGuard(machine.footprint(shape), lambda: measure_usable_memory(caps))
    assert isinstance(spec.input, ImageInput)
    side_px = spec.input.size_px
    data = match_labels(NoiseImages(request.num_examples, spec.labels, side_px), spec.labels)
    surroundings = Surroundings(
        on_step=lambda *_: None,
        should_stop=lambda: False,
        guard=guard,
        scratch=request.scratch,
        scratch_bytes=2**30,
    )
    with measured_peak() as meter:
        trained = trainer.train(work, data, surroundings)
    return Outcome(
        reason=drawn.reason,
        usable_bytes=usable_bytes,
        predicted_bytes=guard.promised_bytes,
        measured_bytes=meter.peak_bytes,
        plan=trained.plan,
        memory=cost.memory,
        step_downs=tuple(guard.step_downs),
        first_loss=trained.first_loss,
        last_loss=trained.last_loss,
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
