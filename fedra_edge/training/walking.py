"""What trainers of all frameworks have in common: they evaluate and predict by the forward walk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Generic

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.engine import ForwardEngine, Moving
from fedra_edge.training.forward_walk import ForwardWalk
from fedra_edge.training.trainer import (
    EvaluationCounts,
    InputArray,
    ShouldStop,
    UsableMemory,
    WholeModel,
)


class WalkingTrainer(ABC, Generic[Moving]):
    """The part of a ``Trainer`` that only goes forward; both methods raise what that says."""

    @abstractmethod
    def forward_engine(self, model: WholeModel) -> ForwardEngine[Moving]:
        """Make a model ready to be walked through."""

    def evaluate(
        self,
        model: WholeModel,
        data: MatchedDataset,
        should_stop: ShouldStop,
        usable_memory: UsableMemory,
    ) -> EvaluationCounts:
        """Count right answers on the held-out examples, with one block in memory at a time."""
        return self._walk(model, should_stop, usable_memory).count(data)

    def predict(
        self,
        model: WholeModel,
        inputs: Iterable[InputArray],
        should_stop: ShouldStop,
        usable_memory: UsableMemory,
    ) -> Iterator[FloatArray]:
        """Yield every label's probability for each input in order, with one block in memory."""
        return self._walk(model, should_stop, usable_memory).probabilities(inputs)

    def _walk(
        self, model: WholeModel, should_stop: ShouldStop, usable_memory: UsableMemory
    ) -> ForwardWalk[Moving]:
        return ForwardWalk(self.forward_engine(model), model.spec, should_stop, usable_memory)
