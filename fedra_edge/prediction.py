"""Predicts the labels of local examples with an exported model, without a server."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self, TypedDict, Unpack

import numpy as np

from fedra_edge.client import load_configured_trainer
from fedra_edge.config import load_site_config
from fedra_edge.data.dataset import SkipReport
from fedra_edge.data.preparing import WrongKindError, prepare_example
from fedra_edge.data.tokenizing import TextTokenizer
from fedra_edge.data.unlabelled import Examples, ExampleSource, open_examples
from fedra_edge.errors import ConfigurationError, DataError, MemoryShortError, SliceError
from fedra_edge.exports import damaged, open_export, open_tokenizer
from fedra_edge.profiling import measure_usable_memory
from fedra_edge.protocol.models import ModelInput, ModelSpec
from fedra_edge.protocol.tensors import FloatArray
from fedra_edge.training.trainer import InputArray, ShouldStop, Trainer


class MachineOptions(TypedDict, total=False):
    """What may be used of the machine, as ``SiteConfig`` explains it."""

    memory_bytes: int | str | None
    backend: str | None
    threads: int | None


class LabelProbability(NamedTuple):
    """How probable the model takes a label to be."""

    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model says of one example.

    ``key`` names the example: its path below the directory or as the list has it. ``top`` holds
    the most probable labels, the first of which is ``label``.
    """

    key: str
    label: str
    probability: float
    top: tuple[LabelProbability, ...]


class _Reading:
    """Reads example after example as a model eats them, and keeps account of it."""

    def __init__(
        self, examples: Examples, wanted: ModelInput, tokenizer: TextTokenizer | None
    ) -> None:
        self.total = len(examples)
        self.num_read = 0
        self.keys: deque[str] = deque()
        self.skipped = SkipReport()
        if isinstance(listed := getattr(examples, "skipped", None), SkipReport):
            self.skipped.merge(listed)
        self._examples = examples
        self._wanted = wanted
        self._tokenizer = tokenizer

    def inputs(self) -> Iterator[InputArray]:
        """Yield what can be read, and note its key before."""
        for index in range(self.total):
            self.num_read += 1
            key = self._examples.key_of(index)
            try:
                prepared = self._prepared(index)
            except WrongKindError:
                raise
            except (DataError, OSError) as error:
                self.skipped.add(str(error) or type(error).__name__, key)
                continue
            self.keys.append(key)
            yield prepared

    def _prepared(self, index: int) -> InputArray:
        prepared = prepare_example(self._examples[index], self._wanted, self._tokenizer)
        if not prepared.size:
            raise DataError("text has no token")
        return prepared


class Predictions:
    """Predictions in the order of the examples, computed while they are iterated over, once.

    Examples that cannot be read are left out and counted in ``skipped``.
    """

    def __init__(
        self, spec: ModelSpec, reading: _Reading, probabilities: Iterator[FloatArray], top: int
    ) -> None:
        self.top = min(top, len(spec.labels))
        self._spec = spec
        self._reading = reading
        self._probabilities = probabilities
        self._num_predicted = 0

    @property
    def num_examples(self) -> int:
        """How many examples there are."""
        return self._reading.total

    @property
    def num_read(self) -> int:
        """How many of them were looked at so far; many are before the first prediction."""
        return self._reading.num_read

    @property
    def num_predicted(self) -> int:
        """How many predictions were given so far."""
        return self._num_predicted

    @property
    def skipped(self) -> SkipReport:
        """What was left out so far, and why."""
        return self._reading.skipped

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Prediction:
        try:
            probabilities = next(self._probabilities)
        except MemoryShortError:
            raise
        except (SliceError, OSError) as error:
            raise damaged(self._spec, error) from error
        key = self._reading.keys.popleft()
        if not np.isfinite(probabilities).all():
            raise damaged(self._spec, ValueError(f"it computes no finite numbers for {key}"))
        best = np.argsort(-probabilities, kind="stable")[: self.top]
        labels = self._spec.labels
        self._num_predicted += 1
        top = tuple(LabelProbability(labels[i], float(probabilities[i])) for i in best)
        return Prediction(key, *top[0], top)


def never() -> bool:
    """Do not stop."""
    return False


def predict(
    export: Path | str,
    data: ExampleSource,
    *,
    top: int = 1,
    trainer: Trainer | None = None,
    should_stop: ShouldStop = never,
    **options: Unpack[MachineOptions],
) -> Predictions:
    """Predict the labels of local examples with an exported model, one block in memory at a time.

    Example:
        >>> for prediction in predict("tuned", "images"):  # doctest: +SKIP
        ...     print(prediction.key, prediction.label, prediction.probability)

    Args:
        export: The directory that ``fedra-server export`` wrote.
        data: A directory of images (or of .txt files, as the model reads), one of them, a CSV
            file with the column path (or text), a list of files, or a dataset of the program's
            own.
        top: How many of the most probable labels to give for each example.
        trainer: A trainer of the program's own.
        should_stop: Asked between steps; true ends the work with ``TrainingInterrupted``.
        **options: What may be used of the machine, as ``SiteConfig`` explains it.

    Raises:
        ConfigurationError: The directory is no export, or a damaged one.
        DataError: There is nothing to predict.
        BackendUnavailableError: No training runtime is installed.
    """
    if top < 1:
        raise ConfigurationError(f"{top} labels cannot be given", remedy="give at least one")
    config = load_site_config(dict(options))
    directory = Path(export)
    model = open_export(directory)
    spec = model.spec
    reading = _Reading(open_examples(data, spec.input), spec.input, open_tokenizer(directory, spec))
    computing = trainer or load_configured_trainer(config)
    usable_memory = partial(measure_usable_memory, config.caps)
    try:
        probabilities = computing.predict(model, reading.inputs(), should_stop, usable_memory)
    except SliceError as error:
        raise damaged(spec, error) from error
    return Predictions(spec, reading, probabilities, top)
