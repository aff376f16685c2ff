"""The local training loop: batches, kept activations and stepping down, on whatever framework."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Final, Generic

import numpy as np
from numpy.typing import NDArray

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.errors import SliceError, TrainingInterrupted
from fedra_edge.protocol.footprint import MemoryPlan
from fedra_edge.protocol.models import ImageInput
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.training.allocator import trim_heap
from fedra_edge.training.checkpoints import Checkpoint, Progress
from fedra_edge.training.engine import Entering, TrainingEngine
from fedra_edge.training.memory_shortage import is_memory_shortage
from fedra_edge.training.prefix_cache import PrefixCache
from fedra_edge.training.sampling import draw_batches
from fedra_edge.training.trainer import InputArray, SliceWork, Surroundings, TrainedSlice

LOGGER: Final = logging.getLogger(__name__)

Indices = NDArray[np.int64]


def train_slice(
    engine: TrainingEngine[Entering],
    work: SliceWork,
    data: MatchedDataset,
    surroundings: Surroundings,
) -> TrainedSlice:
    """Take all steps of a slice.

    Dropout stays off, so that a slice gives the same result whenever it is trained again, also in
    two parts with a checkpoint between them.

    Raises:
        TrainingInterrupted: Told to stop.
        SliceError: The pieces do not fit the model, or training diverged.
        MemoryShortError: Not even the smallest plan fits the memory there is.
    """
    with _prefix_cache(engine, work, data, surroundings) as cache:
        return LocalTraining(engine, work, data, surroundings, cache).run()


class LocalTraining(Generic[Entering]):
    """One slice being trained; the plan may shrink on the way, the result is the same."""

    def __init__(
        self,
        engine: TrainingEngine[Entering],
        work: SliceWork,
        data: MatchedDataset,
        surroundings: Surroundings,
        cache: PrefixCache | None,
    ) -> None:
        self._engine = engine
        self._work = work
        self._data = data
        self._surroundings = surroundings
        self._cache = cache
        self._checkpoint = Checkpoint(surroundings.checkpoint, work.manifest, data, engine.backend)
        self._plan = surroundings.guard.fitting(MemoryPlan.of(work.manifest))
        self._load_within_memory()

    def run(self) -> TrainedSlice:
        """Take all steps; raises what ``train_slice`` does."""
        manifest, train_indices = self._work.manifest, self._data.train_indices
        progress = self._go_on()
        started = time.perf_counter() - progress.train_s
        batches = draw_batches(
            train_indices, manifest.training.batch_size, manifest.steps, manifest.seed
        )
        for batch in islice(batches, progress.steps, None):
            self._heed_wishes(progress)
            loss = self._accumulate_within_memory(batch)
            self._engine.step()
            progress = progress.after(loss, len(batch), time.perf_counter() - started)
            self._surroundings.on_step(progress.steps, manifest.steps, loss)
            if self._checkpoint.is_due:
                self._checkpoint.save(progress, self._engine.state)
        return TrainedSlice(
            adapters=self._engine.values(),
            num_examples=min(progress.num_drawn, len(train_indices)),  # an epoch repeats none
            steps=progress.steps,
            first_loss=progress.first_loss,
            last_loss=progress.last_loss,
            train_s=progress.train_s,
            plan=self._plan,
        )

    def _go_on(self) -> Progress:
        """Go back to where an earlier process was, if it has left anything."""
        stored = self._checkpoint.load()
        if stored is None:
            return Progress()
        self._engine.restore(stored)
        done, steps = stored.progress.steps, self._work.manifest.steps
        LOGGER.info("going on from a checkpoint, after step %d of %d", done, steps)
        self._surroundings.on_resume(done, steps)
        return stored.progress

    def _heed_wishes(self, progress: Progress) -> None:
        """Stop when told to, and keep what has been reached when that, or a rest, was asked for."""
        surroundings = self._surroundings
        if surroundings.is_to_rest():
            self._checkpoint.save(progress, self._engine.state)
        if surroundings.should_stop():
            if surroundings.is_to_rest():  # perhaps since a pause only
                self._checkpoint.save(progress, self._engine.state)
            steps = self._work.manifest.steps
            raise TrainingInterrupted(f"stopped after {progress.steps} of {steps} steps")

    def _accumulate_within_memory(self, batch: Indices) -> float:
        """Add up the gradient of a batch, anew with a smaller plan when memory runs out."""
        while True:
            try:
                return self._accumulate(batch)
            except (MemoryError, RuntimeError, OSError) as error:
                if not is_memory_shortage(error):
                    raise
            self._engine.forget_gradients()
            self._adopt(self._surroundings.guard.smaller(self._plan))

    def _accumulate(self, batch: Indices) -> float:
        """Add up the gradient of the batch's mean loss, in walks of several micro-batches."""
        loss, done = 0.0, 0
        while done < len(batch):
            self._adopt(self._surroundings.guard.fitting(self._plan))
            together = batch[done : done + self._plan.walk_batch]
            parts = _parts(together, self._plan.micro_batch)
            labels = [self._data.labels_of(part) for part in parts]
            loss += self._engine.accumulate(self._enter(parts), labels, len(batch))
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
            return self._engine.enter(self._inputs(parts))
        found = [self._cache.load([int(index) for index in part]) for part in parts]
        missing = [part for part, rows in zip(parts, found, strict=True) if rows is None]
        started = time.perf_counter()
        computed = self._engine.enter(self._inputs(missing)) if missing else []
        computed_s = time.perf_counter() - started
        for part, entering in zip(missing, computed, strict=True):
            rows = self._engine.row_of(entering)
            self._cache.store([int(i) for i in part], rows, computed_s / len(missing))
        fresh = iter(computed)
        return [next(fresh) if rows is None else self._engine.entering_of(rows) for rows in found]

    def _inputs(self, parts: Sequence[Indices]) -> Iterator[InputArray]:
        for part in parts:
            inputs, _ = self._data.batch(part, self._work.spec.input)
            yield inputs

    def _adopt(self, plan: MemoryPlan) -> None:
        """Go on with a plan; weights are loaded anew when they are to live elsewhere."""
        if plan == self._plan:
            return
        is_elsewhere = plan.residency != self._plan.residency
        self._plan = plan
        trim_heap()  # of buffers that were kept for larger micro-batches
        if is_elsewhere:
            self._load_within_memory()

    def _load_within_memory(self) -> None:
        """Load the slice as planned, or with a smaller plan when memory runs out."""
        while True:
            try:
                return self._engine.load(self._plan)
            except (MemoryError, RuntimeError, OSError) as error:
                if not is_memory_shortage(error):
                    raise
            self._plan = self._surroundings.guard.smaller(self._plan)


@contextmanager
def _prefix_cache(
    engine: TrainingEngine[Entering],
    work: SliceWork,
    data: MatchedDataset,
    surroundings: Surroundings,
) -> Iterator[PrefixCache | None]:
    """Open a cache when examples of one shape pass a frozen prefix more than once."""
    repeats = _num_drawn(work.manifest, len(data.train_indices)) > len(data.train_indices)
    is_prefix_frozen = work.manifest.layers[0].role == "frozen"
    is_one_row = isinstance(work.spec.input, ImageInput) and not engine.has_context
    if not (repeats and is_prefix_frozen and is_one_row):
        yield None
        return
    with PrefixCache.opened(surroundings.scratch, surroundings.scratch_bytes) as cache:
        yield cache


def _num_drawn(manifest: SliceManifest, num_examples: int) -> int:
    return manifest.steps * min(manifest.training.batch_size, num_examples)


def _parts(batch: Indices, size: int) -> list[Indices]:
    return [batch[start : start + size] for start in range(0, len(batch), size)]
