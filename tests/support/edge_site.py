"""Named fakes of what a site brings: data in memory, trainers that only count, a model to fetch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from fedra_edge.data.dataset import Example
from fedra_edge.data.matching import MatchedDataset
from fedra_edge.errors import DataError, TrainingInterrupted
from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.footprint import MemoryPlan
from fedra_edge.protocol.models import ModelSpec, Piece
from fedra_edge.protocol.tensors import FloatArray, serialize_tensors
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
from tests.support.builders import make_block_memory
from tests.support.headquarters import Headquarters

PATIENCE_S = 60.0


class MemoryDataset:
    """Grey squares with the tiny model's labels; ``lose`` makes them unreadable."""

    def __init__(self, size: int = 30, labels: tuple[str, ...] = ("zero", "one", "two")) -> None:
        self._size = size
        self._labels = labels
        self.is_lost = False

    def lose(self) -> None:
        """Make every image unreadable from now on."""
        self.is_lost = True

    def __len__(self) -> int:
        """Count the examples."""
        return 0 if self.is_lost else self._size

    def __getitem__(self, index: int) -> Example:
        """Make an image."""
        if self.is_lost:
            raise DataError("the disk with the images is gone")
        return Example(np.full((8, 8), index, dtype=np.uint8), self.label_of(index))

    def label_of(self, index: int) -> str:
        """Give labels in turn."""
        return self._labels[index % len(self._labels)]

    def key_of(self, index: int) -> str:
        """Name an example."""
        return f"example-{index}"

    def is_held_out(self, index: int) -> bool | None:
        """Hold out every fifth."""
        return index % 5 == 0


@dataclass
class CountingTrainer:
    """Adds a little to every trained tensor; the two callbacks may interfere."""

    before_step: Callable[[int], None] = lambda _step: None
    when_trained: Callable[[], None] = lambda: None
    trained: list[str] = field(default_factory=list)
    interrupted: list[str] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    calibrated: list[str] = field(default_factory=list)
    steps_done: int = 0

    @property
    def backend(self) -> Backend:
        """Claims to be PyTorch."""
        return "torch"

    def calibrate(
        self, spec: ModelSpec, usable_memory: UsableMemory, graphs: GraphFiles | None = None
    ) -> BlockCost:
        """Claim to be quick."""
        del graphs
        assert usable_memory() > 0
        self.calibrated.append(spec.name)
        return BlockCost(forward_s=1e-4, backward_s=2e-4, memory=make_block_memory())

    def train(
        self, work: SliceWork, data: MatchedDataset, surroundings: Surroundings
    ) -> TrainedSlice:
        """Count the steps."""
        manifest = work.manifest
        assert all(path.exists() for path in work.weights.values())
        for step in range(1, manifest.steps + 1):
            self.before_step(step)
            if surroundings.should_stop():
                self.interrupted.append(manifest.assignment_id)
                raise TrainingInterrupted("told to stop")
            data.batch(data.train_indices[:2], work.spec.input)
            self.steps_done += 1
            surroundings.on_step(step, manifest.steps, 1.0 / step)
        names = work.spec.delta_shapes(manifest.adapter, manifest.trained_layer_ids)
        self.trained.append(manifest.assignment_id)
        self.when_trained()
        return TrainedSlice(
            adapters={name: work.adapters[name] + np.float32(0.01) for name in names},
            num_examples=len(data.train_indices),
            steps=manifest.steps,
            first_loss=1.0,
            last_loss=0.5,
            train_s=0.1,
            plan=surroundings.guard.fitting(MemoryPlan.of(manifest)),
        )

    def evaluate(
        self,
        model: WholeModel,
        data: MatchedDataset,
        should_stop: ShouldStop,
        usable_memory: UsableMemory,
    ) -> EvaluationCounts:
        """Find half of the answers right, after a look at every piece."""
        assert not should_stop()
        assert usable_memory() > 0
        assert all(model.weights[piece].path.exists() for piece in model.weights)
        self.evaluated.append(len(model.adapters))
        number = len(data.held_out_indices)
        return EvaluationCounts(num_examples=number, num_correct=number // 2, loss_sum=1.5)

    def predict(
        self,
        model: WholeModel,
        inputs: Iterable[InputArray],
        should_stop: ShouldStop,
        usable_memory: UsableMemory,
    ) -> Iterator[FloatArray]:
        """Find every label as probable as the others."""
        assert usable_memory() > 0
        num_labels = len(model.spec.labels)
        for _ in inputs:
            assert not should_stop()
            yield np.full(num_labels, 1 / num_labels, dtype=np.float32)


def with_solid_model(hq: Headquarters, name: str = "solid") -> Headquarters:
    """Register a model all of whose pieces can be fetched, and use it for new runs."""
    generator = np.random.default_rng(11)

    def store(piece: Piece, tensors: dict[str, tuple[int, ...]]) -> Piece:
        values = {key: generator.normal(size=size).astype("f4") for key, size in tensors.items()}
        return Piece(
            weights=hq.services.blobs.put_bytes(serialize_tensors(values)), cost=piece.cost
        )

    spec = hq.spec
    spec = spec.model_copy(
        update={
            "name": name,
            "stem": store(spec.stem, {"projection.weight": (8, 64)}),
            "layers": tuple(
                store(piece, {f"layer{index}.weight": (8, 8)})
                for index, piece in enumerate(spec.layers)
            ),
        }
    )
    hq.services.store.add_model(spec, hq.services.clock.now())
    return replace(hq, spec=spec)


def eventually(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait until something is so, looking often; fail when it does not become so."""
    tick = threading.Event()
    for _ in range(int(timeout_s / 0.02)):
        if condition():
            return
        tick.wait(0.02)
    raise AssertionError("it did not happen in time")
