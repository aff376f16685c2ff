"""The PyTorch trainer: calibration, local training and evaluation, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.models import ImageInput, ModelSpec
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.allocator import return_freed_memory, set_small_objects_apart
from fedra_edge.training.prefix_cache import PrefixCache
from fedra_edge.training.torch_calibration import measure_block, warm_up
from fedra_edge.training.torch_evaluation import ForwardWalk
from fedra_edge.training.torch_training import LocalTraining
from fedra_edge.training.trainer import (
    BlockCost,
    EvaluationCounts,
    InputArray,
    ShouldStop,
    SliceWork,
    Surroundings,
    TrainedSlice,
    UsableMemory,
    WholeModel,
)


class TorchTrainer:
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

    def calibrate(self, spec: ModelSpec, usable_memory: UsableMemory) -> BlockCost:
        """Measure one block of the model with random weights, within a few seconds."""
        return measure_block(spec, usable_memory, self._device)

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
            with _prefix_cache(work, data, surroundings) as cache:
                return LocalTraining(work, data, surroundings, cache, self._device).run()
        finally:
            return_freed_memory()

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
        return ForwardWalk(model, should_stop, usable_memory, self._device).count(data)

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
        return ForwardWalk(model, should_stop, usable_memory, self._device).probabilities(inputs)


@contextmanager
def _prefix_cache(
    work: SliceWork, data: MatchedDataset, surroundings: Surroundings
) -> Iterator[PrefixCache | None]:
    """Open a cache when examples of one shape pass a frozen prefix more than once."""
    repeats = _num_drawn(work.manifest, len(data.train_indices)) > len(data.train_indices)
    is_prefix_frozen = work.manifest.layers[0].role == "frozen"
    if not (repeats and is_prefix_frozen and isinstance(work.spec.input, ImageInput)):
        yield None
        return
    with PrefixCache.opened(surroundings.scratch, surroundings.scratch_bytes) as cache:
        yield cache


def _num_drawn(manifest: SliceManifest, num_examples: int) -> int:
    return manifest.steps * min(manifest.training.batch_size, num_examples)
