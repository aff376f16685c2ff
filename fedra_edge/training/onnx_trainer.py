"""The ONNX Runtime trainer: all that the PyTorch one does, on the CPU, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnxruntime

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.errors import SliceError
from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.allocator import return_freed_memory
from fedra_edge.training.calibrating import measure_block
from fedra_edge.training.forward_walk import ForwardWalk
from fedra_edge.training.local_training import train_slice
from fedra_edge.training.onnx_calibration import OnnxBlockProbe
from fedra_edge.training.onnx_engine import OnnxEngine
from fedra_edge.training.onnx_forward import OnnxForward
from fedra_edge.training.onnx_interface import Interface
from fedra_edge.training.onnx_sessions import Graphs, SessionCache
from fedra_edge.training.onnx_walk import Entering
from fedra_edge.training.trainer import (
    BlockCost,
    EvaluationCounts,
    GraphFiles,
    InputArray,
    ShouldStop,
    SliceWork,
    Surroundings,
    TrainedSlice,
    UsableMemory,
    WholeModel,
)


class OnnxTrainer:
    """Implements ``Trainer`` for models that come with graphs.

    Args:
        threads: How many processor threads to compute with; all that there are by default.
    """

    def __init__(self, threads: int | None = None) -> None:
        onnxruntime.disable_telemetry_events()
        return_freed_memory()
        self._sessions = SessionCache(threads)

    @property
    def backend(self) -> Backend:
        """The framework underneath."""
        return "onnx"

    def calibrate(
        self, spec: ModelSpec, usable_memory: UsableMemory, graphs: GraphFiles | None = None
    ) -> BlockCost:
        """Measure one block of the model with random weights, within a few seconds."""
        opened = self._opened(graphs, spec, spec.default_targets)
        opened.open_all()
        return measure_block(spec, usable_memory, lambda: OnnxBlockProbe(spec, opened))

    def train(
        self, work: SliceWork, data: MatchedDataset, surroundings: Surroundings
    ) -> TrainedSlice:
        """Train the assigned layers' adapters and the head on the training examples.

        Raises:
            TrainingInterrupted: ``should_stop`` said so.
            SliceError: The pieces do not fit the model, or training diverged.
            MemoryShortError: Not even the smallest plan fits the memory there is.
        """
        graphs = self._opened(work.graphs, work.spec, work.manifest.adapter.targets)
        engine = OnnxEngine(work, graphs)
        return train_slice(engine, work, data, surroundings)

    def evaluate(
        self,
        model: WholeModel,
        data: MatchedDataset,
        should_stop: ShouldStop,
        usable_memory: UsableMemory,
    ) -> EvaluationCounts:
        """Count right answers on the held-out examples, with one block in memory at a time.

        Raises:
            TrainingInterrupted: ``should_stop`` said so.
            SliceError: The pieces do not fit the model.
            MemoryShortError: Memory does not even suffice for one example.
        """
        return self._walk(model, should_stop, usable_memory).count(data)

    def predict(
        self,
        model: WholeModel,
        inputs: Iterable[InputArray],
        should_stop: ShouldStop,
        usable_memory: UsableMemory,
    ) -> Iterator[FloatArray]:
        """Yield every label's probability for each input in order, with one block in memory.

        Raises:
            TrainingInterrupted: ``should_stop`` said so.
            SliceError: The pieces do not fit the model.
            MemoryShortError: Memory does not even suffice for one example.
        """
        return self._walk(model, should_stop, usable_memory).probabilities(inputs)

    def _walk(
        self, model: WholeModel, should_stop: ShouldStop, usable_memory: UsableMemory
    ) -> ForwardWalk[Entering]:
        graphs = self._opened(model.graphs, model.spec, model.adapter.targets)
        engine = OnnxForward(model, graphs)
        return ForwardWalk(engine, model.spec, should_stop, usable_memory)

    def _opened(
        self, graphs: GraphFiles | None, spec: ModelSpec, targets: tuple[str, ...]
    ) -> Graphs:
        if graphs is None:
            raise SliceError(
                f"work on {spec.name} needs PyTorch on this machine: it has no graphs for "
                "ONNX Runtime",
                remedy="pip install 'fedra[torch]'",
            )
        return Graphs(graphs, self._sessions, Interface(spec, targets))
