"""Turns one machine's memory, speed and data into the work it can do in a round. Pure.

Full depth comes first, with smaller micro-batches and fewer steps if need be; reduced depth is
for machines whose memory cannot hold all layers or whose deadline allows no full-depth step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fedra_edge.protocol.devices import Calibration, DeviceProfile
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.slices import Depth, TrainingSpec
from fedra_server.runs import RunSpec

_DEADLINE_SHARE: Final = 0.7
"""Part of a round's deadline planned for training; the rest is for transfer and surprises."""

_MEGABYTE: Final = 10**6


@dataclass(frozen=True)
class Work:
    """What one participant is able to do: train ``num_layers`` layers for ``steps`` steps."""

    depth: Depth
    num_layers: int
    micro_batch: int
    steps: int
    predicted_peak_bytes: int
    reason: str


@dataclass(frozen=True)
class Unfit:
    """Why a machine cannot take part."""

    reason: str


def fit_work(
    profile: DeviceProfile, calibration: Calibration, spec: ModelSpec, run: RunSpec
) -> Work | Unfit:
    """Choose depth, number of trained layers, micro-batch and steps for one machine."""
    wanted = min(spec.num_layers, profile.max_layers or spec.num_layers,
                 run.max_layers or spec.num_layers)  # fmt: skip
    full = _fit_full(profile, calibration, spec, run, wanted)
    if run.depth == "full":
        return full
    reduced = _fit_reduced(profile, calibration, spec, run, wanted)
    if run.depth == "reduced" or isinstance(full, Unfit):
        return reduced
    return full


def peak_bytes(
    profile: DeviceProfile, spec: ModelSpec, run: RunSpec, *, held: int, trained: int, examples: int
) -> int:
    """Predict the process's peak memory with ``examples`` examples in flight.

    Sum of the idle process, the weights held, what autograd keeps for ``trained`` layers, the
    working set of one layer's backward pass, and adapters with gradients and optimizer state.
    """
    layer = max(spec.layers, key=lambda piece: piece.cost.activation_bytes).cost
    ends = spec.stem.cost.parameter_bytes + spec.head.cost.parameter_bytes
    ends_activations = spec.stem.cost.activation_bytes + spec.head.cost.activation_bytes
    weights = ends + held * layer.parameter_bytes
    activations = trained * layer.activation_bytes + ends_activations
    working = 2 * layer.activation_bytes + 4 * layer.boundary_bytes
    adapters = held * adapter_bytes(spec, run) * _copies(run.training)
    return profile.baseline_bytes + weights + examples * (activations + working) + adapters


def adapter_bytes(spec: ModelSpec, run: RunSpec) -> int:
    """Size of one layer's adapters in float32."""
    shapes = spec.layer_adapter_shapes(run.adapter, LayerId(0))
    return 4 * sum(math.prod(shape) for shape in shapes.values())


def _fit_full(
    profile: DeviceProfile, calibration: Calibration, spec: ModelSpec, run: RunSpec, wanted: int
) -> Work | Unfit:
    depth = spec.num_layers
    for examples in _micro_batches(run.training.batch_size):
        peak = peak_bytes(profile, spec, run, held=depth, trained=depth, examples=examples)
        if peak <= profile.memory_bytes:
            break
    else:
        need = peak_bytes(profile, spec, run, held=depth, trained=depth, examples=1)
        return Unfit(_too_small(profile, need, f"all {depth} layers"))
    steps = _steps_in_time(calibration, run, depth)
    if steps < 1:
        return Unfit(f"not one step through all {depth} layers fits the deadline")
    reason = (
        f"full depth: {_megabytes(peak)} of {_megabytes(profile.memory_bytes)} at micro-batch "
        f"{examples}, {steps} steps of {_step_s(calibration, run, depth):.2f} s"
    )
    return Work("full", wanted, examples, steps, peak, reason)


def _fit_reduced(
    profile: DeviceProfile, calibration: Calibration, spec: ModelSpec, run: RunSpec, wanted: int
) -> Work | Unfit:
    """Take as many layers as fit, and of the micro-batches that allow as many the largest."""
    in_time = [n for n in range(1, wanted + 1) if _steps_in_time(calibration, run, n) >= 1]
    if not in_time:
        return Unfit(f"not one step through a single layer fits the deadline of {run.deadline_s} s")
    for num_layers in reversed(in_time):
        for examples in _micro_batches(run.training.batch_size):
            peak = peak_bytes(
                profile, spec, run, held=num_layers, trained=num_layers, examples=examples
            )
            if peak <= profile.memory_bytes:
                steps = _steps_in_time(calibration, run, num_layers)
                reason = (
                    f"reduced depth: {num_layers} layers need {_megabytes(peak)} of "
                    f"{_megabytes(profile.memory_bytes)} at micro-batch {examples}, {steps} steps "
                    f"of {_step_s(calibration, run, num_layers):.2f} s"
                )
                return Work("reduced", num_layers, examples, steps, peak, reason)
    need = peak_bytes(profile, spec, run, held=1, trained=1, examples=1)
    return Unfit(_too_small(profile, need, "a single layer"))


def _micro_batches(batch_size: int) -> list[int]:
    sizes = [batch_size]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes


def _step_s(calibration: Calibration, run: RunSpec, layers: int) -> float:
    examples = min(run.training.batch_size, calibration.train_examples)
    return examples * layers * (calibration.forward_s + calibration.backward_s)


def _steps_in_time(calibration: Calibration, run: RunSpec, layers: int) -> int:
    """Steps of the wanted local epochs, as many of them as the deadline allows."""
    per_epoch = math.ceil(calibration.train_examples / run.training.batch_size)
    wanted = per_epoch * run.training.local_epochs
    if run.training.max_steps is not None:
        wanted = min(wanted, run.training.max_steps)
    step_s = _step_s(calibration, run, layers)
    return wanted if step_s == 0 else min(wanted, int(_DEADLINE_SHARE * run.deadline_s / step_s))


def _copies(training: TrainingSpec) -> int:
    """Value, received value, gradient, and the optimizer's moments."""
    return 5 if training.optimizer == "adamw" else 4


def _too_small(profile: DeviceProfile, need_bytes: int, what: str) -> str:
    return (
        f"training {what} needs {_megabytes(need_bytes)}, this process may use "
        f"{_megabytes(profile.memory_bytes)}"
    )


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / _MEGABYTE:.0f} MB"
