"""Trains a slice on ONNX Runtime: its values, clipping and optimizer, and the walk over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np

from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.footprint import MemoryPlan
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.engine import AnyArray, LabelIds
from fedra_edge.training.numpy_optimizers import build_optimizer, clip_gradients
from fedra_edge.training.onnx_pieces import context_names
from fedra_edge.training.onnx_sessions import Graphs
from fedra_edge.training.onnx_walk import Entering, OnnxSlice
from fedra_edge.training.trainer import InputArray, SliceWork

_VALUE: Final = "value"


class OnnxEngine:
    """Implements ``TrainingEngine``; whatever the plan, weights stay in their files."""

    def __init__(self, work: SliceWork, graphs: Graphs) -> None:
        manifest = work.manifest
        names = work.spec.delta_shapes(manifest.adapter, manifest.trained_layer_ids)
        self._values = {name: np.array(work.adapters[name]) for name in sorted(names)}
        self._training = manifest.training
        self._optimizer = build_optimizer(manifest.training)
        self._has_context = bool(context_names(graphs))
        self._slice = OnnxSlice(work, graphs, self._values)

    @property
    def backend(self) -> Backend:
        """The framework underneath."""
        return "onnx"

    @property
    def has_context(self) -> bool:
        """Whether layers need more of a batch than the activations that enter them."""
        return self._has_context

    def load(self, plan: MemoryPlan) -> None:
        """Do nothing: a block is read when the walk comes to it."""

    def enter(self, inputs: Iterable[InputArray]) -> list[Entering]:
        """Bring micro-batches to the lowest trained layer."""
        return self._slice.enter(inputs)

    def row_of(self, entering: Entering) -> FloatArray:
        """Give the activations of a micro-batch."""
        return entering.hidden

    def entering_of(self, rows: FloatArray) -> Entering:
        """Make a micro-batch of activations."""
        return Entering(rows, {})

    def accumulate(
        self, entering: Sequence[Entering], labels: Sequence[LabelIds], num_examples: int
    ) -> float:
        """Add the gradient of the mean loss."""
        return self._slice.accumulate(entering, labels, num_examples)

    def step(self) -> None:
        """Clip the gradient, move the values along it and forget it."""
        gradients = self._slice.gradients
        clip_gradients(gradients, self._training.clip_norm)
        self._optimizer.step(self._values, gradients)
        gradients.clear()

    def forget_gradients(self) -> None:
        """Drop what has been accumulated."""
        self._slice.gradients.clear()

    def values(self) -> dict[str, FloatArray]:
        """Copy the trained values out, by global name."""
        return {name: value.copy() for name, value in self._values.items()}

    def state(self) -> Iterator[tuple[str, AnyArray]]:
        """Show the values and what the optimizer remembers of each."""
        for name, value in self._values.items():
            yield f"{_VALUE}/{name}", value
            for part, array in self._optimizer.state.get(name, {}).items():
                yield f"{part}/{name}", array

    def restore(self, state: Mapping[str, AnyArray]) -> None:
        """Go back to where ``state`` was shown."""
        for key in state:
            part, _, name = key.partition("/")
            if part == _VALUE:
                self._values[name][...] = state[key]
            else:
                self._optimizer.state.setdefault(name, {})[part] = state[key]
