"""What a trainer is, what it is given and what it gives back; no framework is needed to say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.models import AdapterSpec, ModelSpec
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import FloatArray

if TYPE_CHECKING:  # reading data loads an image library, which a trainer's users may not need
    from fedra_edge.data.matching import MatchedDataset

OnStep = Callable[[int, int, float], None]
"""Called after each optimizer step with steps done, steps in all, and the step's mean loss."""

ShouldStop = Callable[[], bool]
"""Asked between steps; true ends the work early."""


@dataclass(frozen=True)
class SliceWork:
    """A slice ready to train: frozen weights as files by piece, adapters by global name.

    ``adapters`` are the received values, of trained and of frozen layers and of the head; a
    trainer never changes them.
    """

    spec: ModelSpec
    manifest: SliceManifest
    weights: Mapping[str, Path]
    adapters: Mapping[str, FloatArray]


@dataclass(frozen=True)
class TrainedSlice:
    """Trained values of exactly the assigned layers' adapters and the head, by global name.

    ``num_examples`` counts the local examples that this training has drawn, each once: fewer
    than there are when its steps end within the first epoch. Losses are means per example of
    the first and the last step.
    """

    adapters: Mapping[str, FloatArray]
    num_examples: int
    steps: int
    first_loss: float
    last_loss: float
    train_s: float


@dataclass(frozen=True)
class WholeModel:
    """A revision of the whole model. Looking a piece up in ``weights`` may download it."""

    spec: ModelSpec
    adapter: AdapterSpec
    weights: Mapping[str, Path]
    adapters: Mapping[str, FloatArray]


@dataclass(frozen=True)
class EvaluationCounts:
    """How a revision did on held-out examples; ``loss_sum`` is the cross-entropy, summed."""

    num_examples: int
    num_correct: int
    loss_sum: float


@dataclass(frozen=True)
class BlockTiming:
    """Measured time of one block, per example."""

    forward_s: float
    backward_s: float


class Trainer(Protocol):
    """Computes on slices; knows neither the server nor the network."""

    @property
    def backend(self) -> Backend:
        """The framework underneath."""
        ...

    def calibrate(self, spec: ModelSpec) -> BlockTiming:
        """Time one block of the model with random weights, within about a second."""
        ...

    def train(
        self, work: SliceWork, data: MatchedDataset, on_step: OnStep, should_stop: ShouldStop
    ) -> TrainedSlice:
        """Train the assigned layers' adapters and the head on the training examples.

        Raises:
            TrainingInterrupted: ``should_stop`` said so.
            SliceError: The pieces do not fit the model.
        """
        ...

    def evaluate(
        self, model: WholeModel, data: MatchedDataset, should_stop: ShouldStop
    ) -> EvaluationCounts:
        """Count right answers on the held-out examples, with one block in memory at a time.

        Raises:
            TrainingInterrupted: ``should_stop`` said so.
            SliceError: The pieces do not fit the model.
        """
        ...
