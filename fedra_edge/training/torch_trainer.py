"""The PyTorch trainer: batches, clipping and optimizer around a slice, on the CPU or a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.errors import SliceError, TrainingInterrupted
from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.training.allocator import return_freed_memory
from fedra_edge.training.sampling import draw_batches
from fedra_edge.training.torch_calibration import time_block, warm_up
from fedra_edge.training.torch_evaluation import evaluate_blockwise
from fedra_edge.training.torch_optimizers import build_optimizer
from fedra_edge.training.torch_slice import TorchSlice, TrainableSlice
from fedra_edge.training.torch_walk import StreamedSlice
from fedra_edge.training.trainer import (
    BlockTiming,
    EvaluationCounts,
    OnStep,
    ShouldStop,
    SliceWork,
    TrainedSlice,
    WholeModel,
)


class TorchTrainer:
    """Implements ``Trainer``; takes the GPU when there is one."""

    def __init__(self, device: torch.device | None = None) -> None:
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(found) if device is None else device
        warm_up(self._device)

    @property
    def backend(self) -> Backend:
        """The framework underneath."""
        return "torch"

    def calibrate(self, spec: ModelSpec) -> BlockTiming:
        """Time one block of the model with random weights, within about a second."""
        return time_block(spec, self._device)

    def train(
        self, work: SliceWork, data: MatchedDataset, on_step: OnStep, should_stop: ShouldStop
    ) -> TrainedSlice:
        """Train the assigned layers' adapters and the head on the training examples.

        Dropout stays off, so that a slice gives the same result whenever it is trained again.

        Raises:
            TrainingInterrupted: ``should_stop`` said so.
            SliceError: The pieces do not fit the model, or training diverged.
        """
        started = time.perf_counter()
        manifest = work.manifest
        loaded = load_slice(work, self._device)
        optimizer = build_optimizer(manifest.training, loaded.trained.values())
        losses: list[float] = []
        num_drawn = 0
        for batch in draw_batches(
            data.train_indices, manifest.training.batch_size, manifest.steps, manifest.seed
        ):
            if should_stop():
                raise TrainingInterrupted(f"stopped after {len(losses)} of {manifest.steps} steps")
            losses.append(_accumulate(loaded, work, data, batch))
            nn.utils.clip_grad_norm_(loaded.trained.values(), manifest.training.clip_norm)
            optimizer.step()
            num_drawn += len(batch)
            on_step(len(losses), manifest.steps, losses[-1])
        return TrainedSlice(
            adapters=loaded.trained_values(),
            num_examples=min(num_drawn, len(data.train_indices)),  # an epoch repeats none
            steps=len(losses),
            first_loss=losses[0],
            last_loss=losses[-1],
            train_s=time.perf_counter() - started,
        )

    def evaluate(
        self, model: WholeModel, data: MatchedDataset, should_stop: ShouldStop
    ) -> EvaluationCounts:
        """Count right answers on the held-out examples, with one block in memory at a time.

        Raises:
            TrainingInterrupted: ``should_stop`` said so.
            SliceError: The pieces do not fit the model.
        """
        return evaluate_blockwise(model, data, should_stop, self._device)


def load_slice(work: SliceWork, device: torch.device) -> TrainableSlice:
    """Make a slice ready to train, in memory or streamed from its files, as the manifest says.

    Raises:
        SliceError: The pieces do not fit the model.
    """
    if work.manifest.residency == "resident":
        return TorchSlice.load(work, device)
    return_freed_memory()
    return StreamedSlice(work, device)


def _accumulate(
    loaded: TrainableSlice, work: SliceWork, data: MatchedDataset, batch: NDArray[np.int64]
) -> float:
    """Add up the gradient of the batch's mean loss, in micro-batches that walk together."""
    micro_batch = work.manifest.micro_batch
    loss = 0.0
    for together in _parts(batch, max(micro_batch, work.manifest.walk_batch)):
        images, labels = [], []
        for indices in _parts(together, micro_batch):
            image_array, label_ids = data.batch(indices, work.spec.input)
            images.append(torch.from_numpy(image_array))
            labels.append(torch.from_numpy(label_ids))
        loss += loaded.accumulate(images, labels, len(batch))
    if not math.isfinite(loss):
        raise SliceError(
            "training diverged: the loss is not finite",
            remedy="Lower the run's learning rate or its clip norm.",
        )
    return loss


def _parts(batch: NDArray[np.int64], size: int) -> Sequence[NDArray[np.int64]]:
    return [batch[start : start + size] for start in range(0, len(batch), size)]
