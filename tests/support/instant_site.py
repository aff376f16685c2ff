"""A real client whose training takes no time: ``python -m tests.support.instant_site URL HOME``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fedra_edge.client import EdgeClient
from fedra_edge.config import load_config
from fedra_edge.data.dataset import Example
from fedra_edge.data.matching import MatchedDataset
from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.footprint import MemoryPlan
from fedra_edge.protocol.layers import HEAD, TensorKey, layer_piece
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.tensors import FloatArray
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
from tests.support.builders import make_block_memory, make_model_spec

_STEP = np.float32(1e-3)


class InstantTrainer:
    """Adds a constant to every tensor of its slice: a delta of full size for no work."""

    backend: Backend = "torch"

    def calibrate(
        self, spec: ModelSpec, usable_memory: UsableMemory, graphs: GraphFiles | None = None
    ) -> BlockCost:
        """Report a quick machine."""
        del spec, usable_memory, graphs
        return BlockCost(forward_s=1e-5, backward_s=2e-5, memory=make_block_memory())

    def train(
        self, work: SliceWork, data: MatchedDataset, surroundings: Surroundings
    ) -> TrainedSlice:
        """Change every assigned tensor."""
        manifest = work.manifest
        pieces = {HEAD, *map(layer_piece, manifest.trained_layer_ids)}
        plan = MemoryPlan(manifest.residency, manifest.micro_batch, manifest.walk_batch)
        return TrainedSlice(
            adapters={
                name: value + _STEP
                for name, value in work.adapters.items()
                if TensorKey.parse(name).piece in pieces
            },
            num_examples=len(data.train_indices),
            steps=manifest.steps,
            first_loss=1.0,
            last_loss=1.0,
            train_s=0.0,
            plan=surroundings.guard.fitting(plan),
        )

    def evaluate(
        self,
        model: WholeModel,
        data: MatchedDataset,
        should_stop: ShouldStop,
        usable_memory: UsableMemory,
    ) -> EvaluationCounts:
        """Never asked: its data are all for training."""
        raise NotImplementedError

    def predict(
        self,
        model: WholeModel,
        inputs: Iterable[InputArray],
        should_stop: ShouldStop,
        usable_memory: UsableMemory,
    ) -> Iterator[FloatArray]:
        """Never asked."""
        raise NotImplementedError


class TrainingImages:
    """A few images, none of them held out, so that nothing is evaluated."""

    _labels = make_model_spec().labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(np.zeros((8, 8), dtype=np.uint8), self._labels[index])

    def label_of(self, index: int) -> str:
        return self._labels[index]

    def key_of(self, index: int) -> str:
        return str(index)

    def is_held_out(self, index: int) -> bool:
        return index < 0


def main(url: str, home: str) -> None:
    """Take part until the process is ended."""
    config = load_config({"server": url, "home": home, "name": Path(home).name})
    with EdgeClient(config, dataset=TrainingImages(), trainer=InstantTrainer()) as client:
        client.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
