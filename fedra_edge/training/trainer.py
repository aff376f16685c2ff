"""What a trainer is, what it is given and what it gives back; no framework is needed to say it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from fedra_edge.protocol.devices import Backend, BlockMemory, Calibration
from fedra_edge.protocol.footprint import MemoryPlan
from fedra_edge.protocol.ids import ModelId
from fedra_edge.protocol.models import AdapterSpec, GraphName, ModelSpec
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import FloatArray, TensorInfo

if TYPE_CHECKING:  # reading data loads an image library, which a trainer's users may not need
    from fedra_edge.data.matching import MatchedDataset

OnResume = Callable[[int, int], None]
"""Called with steps done and steps in all when training goes on from a checkpoint."""

OnStep = Callable[[int, int, float], None]
"""Called after each optimizer step with steps done, steps in all, and the step's mean loss."""

InputArray = NDArray[Any]
"""One example as a model eats it, for example (channels, size, size) of an image."""

ShouldStop = Callable[[], bool]
"""Asked between steps; true ends the work early."""

UsableMemory = Callable[[], int]
"""Measures what the whole process may occupy now, in bytes."""


GraphFiles = Mapping[GraphName, Path]
"""The files of a model's graphs. Looking one up may download it."""


@dataclass(frozen=True)
class SliceWork:
    """A slice ready to train: frozen weights as files by piece, adapters by global name.

    ``adapters`` are the received values, of trained and of frozen layers and of the head; a
    trainer never changes them. ``graphs`` are there when the run has any.
    """

    spec: ModelSpec
    manifest: SliceManifest
    weights: Mapping[str, Path]
    adapters: Mapping[str, FloatArray]
    graphs: GraphFiles | None = None


class MemoryGuard(Protocol):
    """Keeps a slice within the memory there is at the moment."""

    def fitting(self, plan: MemoryPlan, /) -> MemoryPlan:
        """Give the plan itself when it still fits, else the fastest smaller one that does.

        Raises:
            MemoryShortError: Not even the smallest one fits.
        """
        ...

    def smaller(self, plan: MemoryPlan, /) -> MemoryPlan:
        """Give the next smaller plan, for when the memory of this one could not be had.

        Raises:
            MemoryShortError: There is none.
        """
        ...

    def settled_bytes(self) -> float:
        """Give what the process may occupy between two micro-batches as planned now."""
        ...


@dataclass(frozen=True)
class Surroundings:
    """Where and how training goes on: whom to tell, when to stop, what it may occupy.

    ``scratch`` is a directory that outputs of frozen layers may be kept in while training, up to
    ``scratch_bytes``. ``checkpoint`` is a file that training is kept in as it goes on, and gone on
    from. ``is_to_rest`` is asked before ``should_stop``: true when work is to pause or to end by
    somebody's wish, so that what has been reached is worth keeping.
    """

    on_step: OnStep
    should_stop: ShouldStop
    guard: MemoryGuard
    scratch: Path
    scratch_bytes: int
    checkpoint: Path | None = None
    is_to_rest: ShouldStop = lambda: False
    on_resume: OnResume = lambda _done, _total: None


@dataclass(frozen=True)
class TrainedSlice:
    """Trained values of exactly the assigned layers' adapters and the head, by global name.

    ``num_examples`` counts the local examples that this training has drawn, each once: fewer
    than there are when its steps end within the first epoch. Losses are means per example of
    the first and the last step. ``plan`` is how it ended up being worked through.
    """

    adapters: Mapping[str, FloatArray]
    num_examples: int
    steps: int
    first_loss: float
    last_loss: float
    train_s: float
    plan: MemoryPlan


@dataclass(frozen=True)
class PieceFile:
    """Where a piece's frozen weights are: a file of its own, or tensors in a larger one.

    ``tensors`` says, by name inside the piece, where in the file they lie; None is all of it.
    """

    path: Path
    tensors: Mapping[str, TensorInfo] | None = None


@dataclass(frozen=True)
class WholeModel:
    """A revision of the whole model. Looking a piece up in ``weights`` may download it."""

    spec: ModelSpec
    adapter: AdapterSpec
    weights: Mapping[str, PieceFile]
    adapters: Mapping[str, FloatArray]
    graphs: GraphFiles | None = None


@dataclass(frozen=True)
class EvaluationCounts:
    """How a revision did on held-out examples; ``loss_sum`` is the cross-entropy, summed."""

    num_examples: int
    num_correct: int
    loss_sum: float


@dataclass(frozen=True)
class BlockCost:
    """Measured cost of one block on this machine; times are per example."""

    forward_s: float
    backward_s: float
    memory: BlockMemory

    def calibration(self, model_id: ModelId, train: int, held_out: int) -> Calibration:
        """Put it beside the number of local examples, as the server is told."""
        return Calibration(
            model_id=model_id,
            forward_s=self.forward_s,
            backward_s=self.backward_s,
            memory=self.memory,
            train_examples=train,
            held_out_examples=held_out,
        )


class Trainer(Protocol):
    """Computes on slices; knows neither the server nor the network."""

    @property
    def backend(self) -> Backend:
        """The framework underneath."""
        ...

    def calibrate(
        self, spec: ModelSpec, usable_memory: UsableMemory, graphs: GraphFiles | None = None
    ) -> BlockCost:
        """Measure one block of the model with random weights, within a few seconds.

        Raises:
            SliceError: The backend needs the model's graphs, and there are none or unusable ones.
            MemoryShortError: There is not even the memory for one example.
        """
        ...

    def train(
        self, work: SliceWork, data: MatchedDataset, surroundings: Surroundings
    ) -> TrainedSlice:
        """Train the assigned layers' adapters and the head on the training examples.

        Raises:
            TrainingInterrupted: ``should_stop`` said so.
            SliceError: The pieces do not fit the model.
            MemoryShortError: Not even the smallest plan fits the memory there is.
        """
        ...

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
        ...

    def predict(
        self,
        model: WholeModel,
        inputs: Iterable[InputArray],
        should_stop: ShouldStop,
        usable_memory: UsableMemory,
    ) -> Iterator[FloatArray]:
        """Yield every label's probability for each input in order, with one block in memory.

        Inputs are single examples as the model eats them. They are taken as they are needed,
        a good many before the first result.

        Raises:
            TrainingInterrupted: ``should_stop`` said so.
            SliceError: The pieces do not fit the model.
            MemoryShortError: Memory does not even suffice for one example.
        """
        ...
