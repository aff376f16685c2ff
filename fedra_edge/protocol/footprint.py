"""Predicts the memory that a slice takes on a machine; the same on both sides. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

from fedra_edge.protocol.devices import Backend, BlockMemory
from fedra_edge.protocol.ids import LayerId
from fedra_edge.protocol.models import AdapterSpec, ImageInput, ModelSpec, Piece
from fedra_edge.protocol.slices import LayerRole, Residency, SliceManifest, TrainingSpec

_GROWTH_BYTES: Final[Mapping[Backend, int]] = {"torch": 6 * 10**6, "onnx": 3 * 10**6}
"""What an idle client grows by between its calibration and its work: library pages, buffers."""

_MARGIN: Final[Mapping[Backend, float]] = {"torch": 1.02, "onnx": 1.01}
"""What the sum of all parts is still low by: page tables, small objects, the heap's gaps."""

_HEAP_GAPS: Final[Mapping[Residency, float]] = {"resident": 0.1, "streamed": 0.5}
"""What PyTorch's heap may hold unused for each byte of working memory (``training/allocator.py``).

A streamed slice has the larger share, because blocks forward and back use the heap differently.
"""

_SETTLED_GAPS: Final[Mapping[Residency, float]] = {"resident": 0.1, "streamed": 0.0}
"""What of them may be there between two micro-batches; the next leaves some of its own."""

_STREAMED_MICRO_BATCH: Final = 8
"""Streaming gains nothing from larger micro-batches: a block's weights serve a whole walk batch."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a slice is worked through: what decides its memory, and of its result only rounding.

    ``micro_batch`` examples go through a block at once; a streamed slice takes up to
    ``walk_batch`` of them through a block before it loads the next.
    """

    residency: Residency
    micro_batch: int
    walk_batch: int

    @classmethod
    def of(cls, manifest: SliceManifest) -> Self:
        """Give the plan that the server made."""
        walk_batch = max(manifest.walk_batch, manifest.micro_batch)
        return cls(manifest.residency, manifest.micro_batch, walk_batch)


@dataclass(frozen=True)
class SliceShape:
    """What of a slice decides its cost: how many layers it holds, passes back through, trains.

    ``backward`` counts the layers from the lowest trained one up.
    """

    held: int
    backward: int
    trained: int

    @classmethod
    def of(cls, layers: Sequence[LayerRole]) -> Self:
        """Give the shape of a drawn slice."""
        trained = [position for position, layer in enumerate(layers) if layer.role == "train"]
        return cls(len(layers), len(layers) - trained[0], len(trained))


@dataclass(frozen=True)
class Footprint:
    """What a slice of some shape takes on a machine whose block memory was measured."""

    spec: ModelSpec
    adapter: AdapterSpec
    training: TrainingSpec
    memory: BlockMemory
    shape: SliceShape
    backend: Backend

    def peak_bytes(self, plan: MemoryPlan) -> int:
        """Predict the peak memory of the whole process.

        Sum of the idle process, the weights in memory, the adapters with what training adds to
        them, the activations kept between layers or by autograd, and one block's working memory.
        """
        return self._bytes(plan, _HEAP_GAPS)

    def settled_bytes(self, plan: MemoryPlan) -> int:
        """Give what the process may occupy between two micro-batches without endangering that.

        One that occupies more gives back what lies unused in its heap.
        """
        return self._bytes(plan, _SETTLED_GAPS)

    def _bytes(self, plan: MemoryPlan, gaps: Mapping[Residency, float]) -> int:
        spec, shape = self.spec, self.shape
        idle = self.memory.idle_bytes + _GROWTH_BYTES[self.backend] + self._adapter_bytes()
        boundary = max(piece.cost.boundary_bytes for piece in (spec.stem, *spec.layers))
        walking = plan.walk_batch * boundary
        is_streamed = plan.residency == "streamed" or self.backend == "onnx"
        kept = plan.walk_batch * shape.backward * boundary if is_streamed else 0
        working = self._working_bytes(plan, boundary)
        if self.backend == "onnx":
            weights = self._passing_bytes()
        else:
            weights = _resident_bytes(spec, 1 if is_streamed else shape.held)
            absent = kept + max(piece.cost.parameter_bytes for piece in spec.layers)
            entering = self._entering_bytes(plan) - (absent if is_streamed else 0)
            working = max(int((1 + gaps[plan.residency]) * working), entering)
        return int(_MARGIN[self.backend] * (idle + weights + walking + kept + working))

    def _entering_bytes(self, plan: MemoryPlan) -> int:
        """Give what a micro-batch of images takes in the stem, when no streamed block is there yet.

        The convolution puts its weights in another order; images are there as read and prepared.
        """
        wanted = self.spec.input
        if not isinstance(wanted, ImageInput):
            return 0
        image = 4 * wanted.channels * wanted.size_px**2
        return self.spec.stem.cost.parameter_bytes + plan.micro_batch * 2 * image

    def _working_bytes(self, plan: MemoryPlan, boundary: int) -> int:
        """Give what is alive at once of a micro-batch: in one block, or in all that are kept."""
        memory, shape = self.memory, self.shape
        extra = self._extra_kept_bytes(boundary)
        each = memory.working_bytes + extra
        if plan.residency == "resident" and self.backend == "torch":
            frozen = shape.backward - shape.trained
            each += (shape.trained - 1) * (memory.kept_bytes + extra)
            each += frozen * memory.kept_frozen_bytes + shape.backward * boundary
        return memory.fixed_bytes + plan.micro_batch * each

    def _passing_bytes(self) -> int:
        """Give what the head and one other piece take, which is all that ONNX Runtime holds.

        A tensor stored in half precision is beside the piece only while it is widened itself.
        """
        spec = self.spec
        linears = spec.block_linears.values()
        largest = 2 * max(out_features * in_features for out_features, in_features in linears)
        layers = (
            piece.cost.parameter_bytes + min(_stored_beside(piece), largest)
            for piece in spec.layers
        )
        stem = spec.stem.cost.parameter_bytes + _stored_beside(spec.stem)
        return spec.head.cost.parameter_bytes + max(stem, *layers)

    def _extra_kept_bytes(self, boundary_bytes: int) -> int:
        """What a trained layer keeps per example for adapters the measured block does not have.

        The gradient of an adapter needs what enters its linear module.
        """
        linears = self.spec.block_linears
        width = min(in_features for _, in_features in linears.values())
        extra = set(self.adapter.targets) - set(self.spec.default_targets)
        return sum(boundary_bytes * linears[target][1] // width for target in extra)

    def _adapter_bytes(self) -> int:
        """Received values of all held layers; value, gradient and moments of trained ones.

        When training is over, trained values, delta and file take the gradient's place.
        """
        layer = _layer_adapter_bytes(self.spec, self.adapter)
        head = 4 * sum(math.prod(shape) for shape in self.spec.head_parameters.values())
        moments = 2 if self.training.optimizer == "adamw" else 1
        return (self.shape.held * layer + head) + (2 + moments) * (
            self.shape.trained * layer + head
        )


def plans(training: TrainingSpec, backend: Backend) -> Iterator[MemoryPlan]:
    """Give every way in which a backend works through a slice, the fastest first.

    ONNX Runtime always recomputes what a gradient needs, so to it resident weights are of no use.
    """
    if backend == "torch":
        for micro_batch in _halvings(training.batch_size):
            yield MemoryPlan("resident", micro_batch, micro_batch)
    for micro_batch in _halvings(min(_STREAMED_MICRO_BATCH, training.batch_size)):
        for walk_batch in _halvings(training.batch_size):
            if walk_batch >= micro_batch:
                yield MemoryPlan("streamed", micro_batch, walk_batch)


def _halvings(size: int) -> list[int]:
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes


def _resident_bytes(spec: ModelSpec, blocks: int) -> int:
    """Give what stem, head and some blocks take, with the largest file that is being widened."""
    weights = spec.stem.cost.parameter_bytes + spec.head.cost.parameter_bytes
    weights += blocks * max(piece.cost.parameter_bytes for piece in spec.layers)
    return weights + max(map(_stored_beside, (spec.stem, *spec.layers, spec.head)))


def _stored_beside(piece: Piece) -> int:
    """Give what a piece takes in its file while it is widened, when stored in half precision."""
    is_widened = piece.weights.size_bytes < piece.cost.parameter_bytes
    return piece.weights.size_bytes if is_widened else 0


def _layer_adapter_bytes(spec: ModelSpec, adapter: AdapterSpec) -> int:
    shapes = spec.layer_adapter_shapes(adapter, LayerId(0))
    return 4 * sum(math.prod(shape) for shape in shapes.values())
