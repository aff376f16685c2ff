"""Turns one machine's memory, speed and data into the work it can do in a round. Pure.

Full depth comes first: the fastest way to work through it that fits the memory, with fewer steps
if need be. Reduced depth is for machines that full depth does not fit or whose deadline allows no
full-depth step, and for runs that ask for it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from fedra_edge.protocol.devices import Backend, Calibration, DeviceProfile
from fedra_edge.protocol.families import ONNX_FAMILY
from fedra_edge.protocol.footprint import Footprint, MemoryPlan, SliceShape, plans
from fedra_edge.protocol.models import AdapterSpec, ModelSpec
from fedra_edge.protocol.slices import Depth, Residency, TrainingSpec

DepthPolicy = Literal["auto", "full", "reduced"]

_DEADLINE_SHARE: Final = 0.7
"""Part of a round's deadline planned for training; the rest is for transfer and surprises."""

_MOST_STEPS: Final = 10**6
"""What a slice manifest can ask for."""

_MEGABYTE: Final = 10**6


@dataclass(frozen=True)
class Terms:
    """What of a run decides what a machine can do in it.

    Without graphs, only PyTorch can compute it.
    """

    adapter: AdapterSpec
    training: TrainingSpec
    deadline_s: float
    depth: DepthPolicy
    max_layers: int | None
    has_graphs: bool = True

    @property
    def training_s(self) -> float:
        """How long training may take of a round, which also has to transfer."""
        return _DEADLINE_SHARE * self.deadline_s

    @property
    def depths(self) -> tuple[Depth, ...]:
        """The depths that a machine may be given, the preferred one first."""
        return ("full", "reduced") if self.depth == "auto" else (self.depth,)


@dataclass(frozen=True)
class Work:
    """What one participant is able to do: train ``num_layers`` layers for ``steps`` steps."""

    depth: Depth
    plan: MemoryPlan
    num_layers: int
    steps: int
    step_s: float
    predicted_peak_bytes: int
    facts: str
    why_not_more: str = ""

    @property
    def reason(self) -> str:
        """Say in one line what was decided and what stood against more."""
        return f"{self.facts}; {self.why_not_more}" if self.why_not_more else self.facts


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
    terms: Terms

    @property
    def most_layers(self) -> int:
        """How many layers may be trained here: all, or what the site or the run allow."""
        caps = (self.spec.num_layers, self.profile.max_layers, self.terms.max_layers)
        return min(cap for cap in caps if cap is not None)

    def work(self, depth: Depth) -> Work | None:
        """Find the fastest plan for the most layers that memory, disk and deadline allow.

        At reduced depth, resident weights come before more layers, as published. Every demand
        grows with the layers, so the most that fit are found by bisection.
        """
        every = tuple(self._plans())
        resident = tuple(plan for plan in every if plan.residency == "resident")
        for among in (every,) if depth == "full" else (resident, every):
            layers = range(1, self.most_layers + 1)
            most = bisect_right(
                layers, 0, key=lambda trained: self._fitting_plan(depth, trained, among) is None
            )
            plan = self._fitting_plan(depth, most, among) if most else None
            if plan is not None:
                shape = self.shape(depth, most)
                return self._work(depth, plan, shape, self.steps_in_time(shape, plan))
        return None

    def _fitting_plan(
        self, depth: Depth, trained: int, among: Sequence[MemoryPlan]
    ) -> MemoryPlan | None:
        shape = self.shape(depth, trained)
        if self.disk_bytes(depth, trained) > self.profile.disk_free_bytes:
            return None
        peak_bytes = self.footprint(shape).peak_bytes
        for plan in among:
            if self.steps_in_time(shape, plan) and peak_bytes(plan) <= self.profile.memory_bytes:
                return plan
        return None

    def _plans(self) -> Iterator[MemoryPlan]:
        """Give all plans of this backend for batches as large as the local examples allow."""
        training = self.terms.training
        batch_size = min(training.batch_size, self.calibration.train_examples)
        cut = training.model_copy(update={"batch_size": batch_size})
        return plans(cut, self.profile.backend)

    def disk_bytes(self, depth: Depth, trained: int) -> int:
        """Give what the frozen weights of a slice take on disk at most."""
        spec = self.spec
        largest = max(piece.weights.size_bytes for piece in spec.layers)
        ends = spec.stem.weights.size_bytes + spec.head.weights.size_bytes
        return ends + self.shape(depth, trained).held * largest

    def drawn(self, work: Work, shape: SliceShape) -> Work:
        """Make work exact once its layers are drawn: the promise, and steps that now fit."""
        return self._work(work.depth, work.plan, shape, self.steps_in_time(shape, work.plan))

    def shape(self, depth: Depth, trained: int) -> SliceShape:
        """Give the costliest shape that this many trained layers can be drawn as."""
        held = self.spec.num_layers if depth == "full" else trained
        return SliceShape(held=held, backward=held, trained=trained)

    def footprint(self, shape: SliceShape) -> Footprint:
        """Give what a slice of this shape takes here."""
        terms = self.terms
        memory = self.calibration.memory
        idle_bytes = max(memory.idle_bytes, self.profile.baseline_bytes)
        own = memory.model_copy(update={"idle_bytes": idle_bytes})
        return Footprint(self.spec, terms.adapter, terms.training, own, shape, self.profile.backend)

    def least_bytes(self, depth: Depth, layers: int = 1, of: Residency | None = None) -> int:
        """Give the least memory that training so many layers takes, in one residency or any."""
        peak_bytes = self.footprint(self.shape(depth, layers)).peak_bytes
        every = self._plans()
        return min(peak_bytes(plan) for plan in every if of in {None, plan.residency})

    @property
    def wanted_steps(self) -> int:
        """Steps of the wanted local epochs, whatever time they take."""
        training = self.terms.training
        wanted = math.ceil(self.calibration.train_examples / training.batch_size)
        wanted *= training.local_epochs
        return min(wanted, training.max_steps or _MOST_STEPS, _MOST_STEPS)

    def steps_in_time(self, shape: SliceShape, plan: MemoryPlan) -> int:
        """Give as many of the wanted steps as the deadline allows."""
        wanted, available_s = self.wanted_steps, self.terms.training_s
        step_s = self.step_s(shape, plan)
        return wanted if wanted * step_s <= available_s else int(available_s / step_s)

    def step_s(self, shape: SliceShape, plan: MemoryPlan) -> float:
        """Predict the duration of a step; a streamed walk goes forward again to come back."""
        examples = min(self.terms.training.batch_size, self.calibration.train_examples)
        forwards = shape.held + (shape.backward - 1 if plan.residency == "streamed" else 0)
        calibration = self.calibration
        per_example_s = forwards * calibration.forward_s + shape.backward * calibration.backward_s
        return examples * per_example_s

    def _work(self, depth: Depth, plan: MemoryPlan, shape: SliceShape, steps: int) -> Work:
        peak_bytes = self.footprint(shape).peak_bytes(plan)
        step_s = self.step_s(shape, plan)
        facts = (
            f"{depth} depth, {plan.residency}, {_megabytes(peak_bytes)} of "
            f"{_megabytes(self.profile.memory_bytes)}, {steps} steps of {step_s:.2f} s"
        )
        work = Work(depth, plan, shape.trained, steps, step_s, peak_bytes, facts)
        return replace(work, why_not_more="; ".join(_why_not_more(self, work)))


def why_not_on(backend: Backend, spec: ModelSpec, terms: Terms) -> str | None:
    """Tell why a backend cannot compute a model in a run; None when it can."""
    if backend == "onnx" and not terms.has_graphs:
        return "it has no graphs for clients without PyTorch"
    if backend == "torch" and spec.family == ONNX_FAMILY:
        return "its model is only there as ONNX; join with --backend onnx"
    return None


def fit_work(
    profile: DeviceProfile, calibration: Calibration, spec: ModelSpec, terms: Terms
) -> Work | Unfit:
    """Choose depth, residency, number of trained layers, batches and steps for one machine."""
    if obstacle := why_not_on(profile.backend, spec, terms):
        return Unfit(obstacle)
    machine = Machine(profile, calibration, spec, terms)
    for depth in terms.depths:
        work = machine.work(depth)
        if work is not None:
            return work
    return _unfit(machine, terms.depths[-1])


def _why_not_more(machine: Machine, work: Work) -> Iterator[str]:
    """Say what kept a machine from the best work, for the operator."""
    most, num_layers = machine.most_layers, machine.spec.num_layers
    if most < num_layers:
        whose = "site" if most == machine.profile.max_layers else "run"
        yield f"at most {most} of {num_layers} layers, by the {whose}'s own limit"
    if work.depth != machine.terms.depths[0]:
        yield f"no full depth, because {_unfit(machine, 'full').reason}"
    residency = work.plan.residency
    if work.num_layers < most:
        need = machine.least_bytes(work.depth, work.num_layers + 1, of=residency)
        disk = machine.disk_bytes(work.depth, work.num_layers + 1)
        why = "more take too long"
        if need > machine.profile.memory_bytes:
            why = f"one more needs {_megabytes(need)}"
        elif disk > machine.profile.disk_free_bytes:
            why = f"one more needs {_megabytes(disk)} of disk"
        yield f"{work.num_layers} of {most} layers, because {why}"
    if residency == "streamed" and machine.profile.backend == "torch":
        need = machine.least_bytes(work.depth, work.num_layers, of="resident")
        yield f"streamed, because weights that stay in memory need {_megabytes(need)}"
    if work.steps < machine.wanted_steps:
        yield f"{work.steps} of {machine.wanted_steps} steps, because of the deadline"


def _unfit(machine: Machine, depth: Depth) -> Unfit:
    """Say what is missing for the least work of a depth."""
    shape = machine.shape(depth, 1)
    layers = f"{shape.held} layers" if shape.held > 1 else "a single layer"
    need = machine.least_bytes(depth)
    has = machine.profile.memory_bytes
    if need > has:
        return Unfit(
            f"training {layers} needs {_megabytes(need)}, this process may use {_megabytes(has)}"
        )
    need, has = machine.disk_bytes(depth, 1), machine.profile.disk_free_bytes
    if need > has:
        return Unfit(
            f"the weights of {layers} take {_megabytes(need)} of disk, {_megabytes(has)} are free"
        )
    return Unfit(
        f"one step through {layers} does not fit the deadline of {machine.terms.deadline_s} s"
    )


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / _MEGABYTE:.0f} MB"
