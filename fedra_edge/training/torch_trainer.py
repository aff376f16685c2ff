"""The PyTorch trainer: calibration, local training and evaluation, on the CPU or a GPU."""

from __future__ import annotations

import torch
from typing_extensions import override

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.training.allocator import return_freed_memory, set_small_objects_apart
from fedra_edge.training.calibrating import measure_block
from fedra_edge.training.local_training import train_slice
from fedra_edge.training.torch_calibration import TorchBlockProbe, warm_up
from fedra_edge.training.torch_engine import TorchEngine
from fedra_edge.training.torch_forward import TorchForward
from fedra_edge.training.torch_slice import Entering
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


class TorchTrainer(WalkingTrainer[Entering]):
    """Implements ``Trainer``; takes the GPU when there is one."""

    def __init__(self, device: torch.device | None = None) -> None:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(found) if device is None else device
        return_freed_memory()
        set_small_objects_apart()
        warm_up(self._device)

    @property
    def backend(self) -> Backend:
        """The framework underneath."""
        return "torch"

    def calibrate(
        self, spec: ModelSpec, usable_memory: UsableMemory, graphs: GraphFiles | None = None
    ) -> BlockCost:
        """Measure one block of the model with random weights; graphs are of no use to it."""
        del graphs
        return measure_block(spec, usable_memory, lambda: TorchBlockProbe(spec, self._device))

    def train(
        self, work: SliceWork, data: MatchedDataset, surroundings: Surroundings
    ) -> TrainedSlice:
        """Train the assigned layers' adapters and the head on the training examples.

        Dropout stays off, so that a slice gives the same result whenever it is trained again.

        Raises:
            TrainingInterrupted: ``should_stop`` said so.
            SliceError: The pieces do not fit the model, or training diverged.
            MemoryShortError: Not even the smallest plan fits the memory there is.
        """
        try:
            engine = TorchEngine(work, self._device, surroundings.guard.settled_bytes)
            return train_slice(engine, work, data, surroundings)
        finally:
            return_freed_memory()

    @override
    def forward_engine(self, model: WholeModel) -> TorchForward:
        """Make the model ready on this trainer's device."""
        return TorchForward(model, self._device)
