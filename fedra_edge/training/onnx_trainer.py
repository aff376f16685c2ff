"""The ONNX Runtime trainer: all that the PyTorch one does, on the CPU, without PyTorch."""

from __future__ import annotations

import onnxruntime
from typing_extensions import override

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.errors import SliceError
from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.training.allocator import return_freed_memory
from fedra_edge.training.calibrating import measure_block
from fedra_edge.training.local_training import train_slice
from fedra_edge.training.onnx_calibration import OnnxBlockProbe
from fedra_edge.training.onnx_engine import OnnxEngine
from fedra_edge.training.onnx_forward import OnnxForward
from fedra_edge.training.onnx_interface import Interface
from fedra_edge.training.onnx_sessions import Graphs, SessionCache
from fedra_edge.training.onnx_walk import Entering
from fedra_edge.training.trainer import (
    BlockCost,
    GraphFiles,
    SliceWork,
    Surroundings,
    TrainedSlice,
    UsableMemory,
    WholeModel,
)
from fedra_edge.training.walking import WalkingTrainer


class OnnxTrainer(WalkingTrainer[Entering]):
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

    @override
    def forward_engine(self, model: WholeModel) -> OnnxForward:
        """Open the graphs that the model comes with.

        Raises:
            SliceError: It comes with none, or they are not its own.
        """
        return OnnxForward(model, self._opened(model.graphs, model.spec, model.adapter.targets))

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
