"""The local training loop: batches, clipping and optimizer around a slice of either residency."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.errors import SliceError, TrainingInterrupted
from fedra_edge.protocol.footprint import MemoryPlan
from fedra_edge.training.allocator import keep_freed_memory, return_freed_memory
from fedra_edge.training.prefix_cache import PrefixCache
from fedra_edge.training.sampling import draw_batches
from fedra_edge.training.torch_optimizers import build_optimizer
from fedra_edge.training.torch_slice import (
    Entering,
    ResidentSlice,
    TrainableSlice,
    parameter_values,
    trained_parameters,
)
from fedra_edge.training.torch_walk import StreamedSlice
from fedra_edge.training.trainer import SliceWork, Surroundings, TrainedSlice

Indices = NDArray[np.int64]
_SHORTAGE_SIGNS = (
    "allocate memory", "out of memory", "bad_alloc", "not enough memory",
    "could not create a primitive", "could not execute a primitive",
)  # fmt: skip
"""What PyTorch, oneDNN and the system say, in errors of no type of their own, of memory."""


class LocalTraining:
    """One slice being trained; the plan may shrink on the way, the result is the same."""

    def __init__(
        self,
        work: SliceWork,
        data: MatchedDataset,
        surroundings: Surroundings,
        cache: PrefixCache | None,
        device: torch.device,
    ) -> None:
        self._work = work
        self._data = data
        self._surroundings = surroundings
        self._cache = cache
        self._device = device
        self._parameters = trained_parameters(work, device)
        self._plan = surroundings.guard.fitting(MemoryPlan.of(work.manifest))
        self._loaded = self._load_within_memory()

    def run(self) -> TrainedSlice:
        """Take all steps.

        Raises:
            TrainingInterrupted: Told to stop.
            SliceError: The pieces do not fit the model, or training diverged.
            MemoryShortError: Not even the smallest plan fits the memory there is.
        """
        started = time.perf_counter()
        manifest = self._work.manifest
        optimizer = build_optimizer(manifest.training, self._parameters.values())
        train_indices = self._data.train_indices
        losses: list[float] = []
        num_drawn = 0
        for batch in draw_batches(
            train_indices, manifest.training.batch_size, manifest.steps, manifest.seed
        ):
            if self._surroundings.should_stop():
                raise TrainingInterrupted(f"stopped after {len(losses)} of {manifest.steps} steps")
            losses.append(self._accumulate_within_memory(batch))
            nn.utils.clip_grad_norm_(self._parameters.values(), manifest.training.clip_norm)
            optimizer.step()
            num_drawn += len(batch)
            self._surroundings.on_step(len(losses), manifest.steps, losses[-1])
        return TrainedSlice(
            adapters=parameter_values(self._parameters),
            num_examples=min(num_drawn, len(train_indices)),  # an epoch repeats none
            steps=len(losses),
            first_loss=losses[0],
            last_loss=losses[-1],
            train_s=time.perf_counter() - started,
            plan=self._plan,
        )

    def _accumulate_within_memory(self, batch: Indices) -> float:
        """Add up the gradient of a batch, anew with a smaller plan when memory runs out."""
        while True:
            try:
                return self._accumulate(batch)
            except (MemoryError, RuntimeError, OSError) as error:
                if not is_memory_shortage(error):
                    raise
            for parameter in self._parameters.values():
                parameter.grad = None
            self._adopt(self._surroundings.guard.smaller(self._plan))

    def _accumulate(self, batch: Indices) -> float:
        """Add up the gradient of the batch's mean loss, in walks of several micro-batches."""
        loss, done = 0.0, 0
        while done < len(batch):
            self._adopt(self._surroundings.guard.fitting(self._plan))
            together = batch[done : done + self._plan.walk_batch]
            parts = _parts(together, self._plan.micro_batch)
            labels = [torch.from_numpy(self._data.labels_of(part)) for part in parts]
            loss += self._loaded.accumulate(self._enter(parts), labels, len(batch))
            done += len(together)
        if not math.isfinite(loss):
            raise SliceError(
                "training diverged: the loss is not finite",
                remedy="Lower the run's learning rate or its clip norm.",
            )
        return loss

    def _enter(self, parts: Sequence[Indices]) -> list[Entering]:
        """Bring micro-batches to the lowest trained layer, from the cache where it has them."""
        if self._cache is None:
            return self._loaded.enter(self._inputs(parts))
        found = [self._cache.load([int(index) for index in part]) for part in parts]
        missing = [part for part, rows in zip(parts, found, strict=True) if rows is None]
        started = time.perf_counter()
        computed = self._loaded.enter(self._inputs(missing)) if missing else []
        computed_s = time.perf_counter() - started
        for part, entering in zip(missing, computed, strict=True):
            rows = entering.hidden.cpu().numpy()
            self._cache.store([int(i) for i in part], rows, computed_s / len(missing))
        fresh = iter(computed)
        return [
            next(fresh) if rows is None else Entering(torch.from_numpy(rows).to(self._device), ())
            for rows in found
        ]

    def _inputs(self, parts: Sequence[Indices]) -> Iterator[Tensor]:
        for part in parts:
            inputs, _ = self._data.batch(part, self._work.spec.input)
            yield torch.from_numpy(inputs)

    def _adopt(self, plan: MemoryPlan) -> None:
        """Go on with a plan; weights are loaded anew when they are to live elsewhere."""
        is_elsewhere = plan.residency != self._plan.residency
        self._plan = plan
        if is_elsewhere:
            del self._loaded
            self._loaded = self._load_within_memory()

    def _load_within_memory(self) -> TrainableSlice:
        """Load the slice as planned, or with a smaller plan when memory runs out."""
        while True:
            try:
                return load_slice(self._work, self._plan, self._parameters, self._device)
            except (MemoryError, RuntimeError, OSError) as error:
                if not is_memory_shortage(error):
                    raise
            self._plan = self._surroundings.guard.smaller(self._plan)


def load_slice(
    work: SliceWork,
    plan: MemoryPlan,
    parameters: dict[str, nn.Parameter],
    device: torch.device,
) -> TrainableSlice:
    """Make a slice ready to train, in memory or streamed from its files.

    Raises:
        SliceError: The pieces do not fit the model.
    """
    if plan.residency == "resident":
        keep_freed_memory()
        return ResidentSlice(work, parameters, device)
    return_freed_memory()
    return StreamedSlice(work, parameters, device)


def is_memory_shortage(error: Exception) -> bool:
    """Tell an error that a smaller plan may avoid from all others."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in told for sign in _SHORTAGE_SIGNS)


def _parts(batch: Indices, size: int) -> list[Indices]:
    return [batch[start : start + size] for start in range(0, len(batch), size)]
