"""Turns one machine's memory, speed and data into the work it can do in a round. Pure.

Full depth comes first: with resident weights, else with streamed ones, with smaller
micro-batches and fewer steps if need be. Reduced depth is for machines whose deadline allows no
full-depth step, and for runs that ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fedra_edge.protocol.devices import Calibration, DeviceProfile
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.slices import Depth, Residency, TrainingSpec
from fedra_server.runs import RunSpec

_DEADLINE_SHARE: Final = 0.7
"""Part of a round's deadline planned for training; the rest is for transfer and surprises."""

_STREAMED_MICRO_BATCH: Final = 8
"""Streaming gains nothing from larger micro-batches: a block's weights serve a whole walk batch."""

_FRAGMENTATION: Final = 1.5
"""What the C library's heap makes of a resident slice's activations; a streamed walk avoids it."""

_MOST_STEPS: Final = 10**6
"""What a slice manifest can ask for."""

_GROWTH_BYTES: Final = 32 * 10**6
"""What an idle client's process grows by at work, whatever the model: buffers, library pages."""

_BLOCKS_MAPPED: Final = 2
"""A streamed walk maps the next block before it lets go of the last."""

_MEGABYTE: Final = 10**6


@dataclass(frozen=True)
class Work:
    """What one participant is able to do: train ``num_layers`` layers for ``steps`` steps."""

    depth: Depth
    residency: Residency
    num_layers: int
    micro_batch: int
    walk_batch: int
    steps: int
    predicted_peak_bytes: int
    reason: str


@dataclass(frozen=True)
class Unfit:
    """Why a machine cannot take part."""

    reason: str


@dataclass(frozen=True)
class Machine:
    """A machine facing a run: what it has, what a block costs on it, and what is asked."""

    profile: DeviceProfile
    calibration: Calibration
    spec: ModelSpec
    run: RunSpec

    def work(self, depth: Depth, residency: Residency, wanted: int) -> Work | None:
        """Find the most work of one kind that memory and deadline allow."""
        for trained in [wanted] if depth == "full" else range(wanted, 0, -1):
            held = self.spec.num_layers if depth == "full" else trained
            steps = self.steps_in_time(held, residency)
            for micro_batch, walk_batch in self._batches(residency) if steps else ():
                peak = self.peak_bytes(residency, held, micro_batch, walk_batch)
                if peak <= self.profile.memory_bytes:
                    return Work(
                        depth, residency, trained, micro_batch, walk_batch, steps, peak,
                        self._explained(depth, residency, held, steps, peak),
                    )  # fmt: skip
        return None

    def peak_bytes(self, residency: Residency, held: int, micro_batch: int, walk_batch: int) -> int:
        """Predict the process's peak memory.

        Sum of the idle process; the weights in memory; what autograd keeps per example, of all
        held layers when resident, of one when streamed; what enters each layer, kept by a
        streamed walk; the working set of one layer's backward pass; and adapters with
        gradients and optimizer state.
        """
        spec = self.spec
        layer = max(spec.layers, key=lambda piece: piece.cost.activation_bytes).cost
        ends = spec.stem.cost.parameter_bytes + spec.head.cost.parameter_bytes
        ends_kept = spec.stem.cost.activation_bytes + spec.head.cost.activation_bytes
        working = 2 * layer.activation_bytes + 4 * layer.boundary_bytes + ends_kept
        adapters = held * adapter_bytes(spec, self.run) * _copies(self.run.training)
        if residency == "resident":
            weights = ends + held * layer.parameter_bytes
            activations = micro_batch * (held * layer.activation_bytes + working)
            in_flight = int(_FRAGMENTATION * activations)
        else:
            weights = ends + _BLOCKS_MAPPED * layer.parameter_bytes
            in_flight = micro_batch * (layer.activation_bytes + working)
            in_flight += walk_batch * held * layer.boundary_bytes
        idle = self.profile.baseline_bytes + _GROWTH_BYTES
        return idle + weights + in_flight + adapters

    def steps_in_time(self, held: int, residency: Residency) -> int:
        """Steps of the wanted local epochs, as many of them as the deadline allows."""
        training = self.run.training
        wanted = math.ceil(self.calibration.train_examples / training.batch_size)
        wanted *= training.local_epochs
        if training.max_steps is not None:
            wanted = min(wanted, training.max_steps)
        wanted = min(wanted, _MOST_STEPS)
        step_s = self.step_s(held, residency)
        available_s = _DEADLINE_SHARE * self.run.deadline_s
        return wanted if wanted * step_s <= available_s else int(available_s / step_s)

    def step_s(self, held: int, residency: Residency) -> float:
        """Predict the duration of a step; a streamed walk goes forward twice."""
        examples = min(self.run.training.batch_size, self.calibration.train_examples)
        forwards = 2 if residency == "streamed" else 1
        per_layer = forwards * self.calibration.forward_s + self.calibration.backward_s
        return examples * held * per_layer

    def _batches(self, residency: Residency) -> Iterator[tuple[int, int]]:
        """Give (micro-batch, walk batch) from the most memory to the least."""
        batch_size = self.run.training.batch_size
        if residency == "resident":
            for micro_batch in _halvings(batch_size):
                yield micro_batch, micro_batch
            return
        for micro_batch in _halvings(min(_STREAMED_MICRO_BATCH, batch_size)):
            for walk_batch in _halvings(batch_size):
                if walk_batch >= micro_batch:
                    yield micro_batch, walk_batch

    def _explained(
        self, depth: Depth, residency: Residency, held: int, steps: int, peak: int
    ) -> str:
        return (
            f"{depth} depth, {residency}: {_megabytes(peak)} of "
            f"{_megabytes(self.profile.memory_bytes)}, {steps} steps of "
            f"{self.step_s(held, residency):.2f} s"
        )


def fit_work(
    profile: DeviceProfile, calibration: Calibration, spec: ModelSpec, run: RunSpec
) -> Work | Unfit:
    """Choose depth, residency, number of trained layers, batches and steps for one machine."""
    machine = Machine(profile, calibration, spec, run)
    caps = (spec.num_layers, profile.max_layers, run.max_layers)
    wanted = min(cap for cap in caps if cap is not None)
    depths: tuple[Depth, ...] = ("full", "reduced") if run.depth == "auto" else (run.depth,)
    residencies: tuple[Residency, ...] = ("resident", "streamed")
    for depth in depths:
        for residency in residencies:
            work = machine.work(depth, residency, wanted)
            if work is not None:
                return work
    return _unfit(machine, depths[-1])


def _unfit(machine: Machine, depth: Depth) -> Unfit:
    """Say what is missing for the least work of a depth."""
    held = machine.spec.num_layers if depth == "full" else 1
    layers = f"{held} layers" if held > 1 else "a single layer"
    need = min(machine.peak_bytes(kind, held, 1, 1) for kind in ("resident", "streamed"))
    has = machine.profile.memory_bytes
    if need > has:
        return Unfit(
            f"training {layers} needs {_megabytes(need)}, this process may use {_megabytes(has)}"
        )
    return Unfit(
        f"one step through {layers} does not fit the deadline of {machine.run.deadline_s} s"
    )


def adapter_bytes(spec: ModelSpec, run: RunSpec) -> int:
    """Size of one layer's adapters in float32."""
    shapes = spec.layer_adapter_shapes(run.adapter, LayerId(0))
    return 4 * sum(math.prod(shape) for shape in shapes.values())


def _halvings(size: int) -> list[int]:
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes


def _copies(training: TrainingSpec) -> int:
    """Value, received value, gradient, and the optimizer's moments."""
    return 5 if training.optimizer == "adamw" else 4


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / _MEGABYTE:.0f} MB"
