"""Fits local data to a model's labels, by name, and says what had to be left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedra_edge.data.dataset import (
    LocalDataset,
    SelfCheckingDataset,
    SkipReport,
    is_held_out_by_key,
)
from fedra_edge.data.images import prepare_image
from fedra_edge.errors import DataError
from fedra_edge.protocol.models import ImageInput
from fedra_edge.protocol.tensors import FloatArray

_FEW_EXAMPLES: Final = 2


@dataclass(frozen=True)
class MatchedDataset:
    """The usable examples of a dataset, by index, split into a training and a held-out part.

    ``label_ids`` maps the index of each usable example to its place in the model's label list.
    """

    dataset: LocalDataset
    train_indices: tuple[int, ...]
    held_out_indices: tuple[int, ...]
    label_ids: Mapping[int, int]
    report: SkipReport = field(default_factory=SkipReport)

    def batch(
        self, indices: Sequence[int] | NDArray[np.int64], wanted: ImageInput
    ) -> tuple[FloatArray, NDArray[np.int64]]:
        """Read examples as the model eats them.

        Returns:
            Images of shape (n, channels, size, size) and label ids of shape (n,).

        Raises:
            DataError: An example that could be read before cannot be read any more.
        """
        plain = [int(index) for index in indices]
        size = (wanted.channels, wanted.size_px, wanted.size_px)
        images = np.empty((len(plain), *size), dtype=np.float32)
        for row, index in enumerate(plain):
            images[row] = self._prepared(index, wanted)
        return images, np.asarray([self.label_ids[index] for index in plain], dtype=np.int64)

    def _prepared(self, index: int, wanted: ImageInput) -> FloatArray:
        try:
            return prepare_image(self.dataset[index].image, wanted)
        except (DataError, OSError) as error:
            raise DataError(
                f"{self.dataset.key_of(index)} cannot be read: {error}",
                remedy="Keep the data in place while a run is going on.",
            ) from error


def match_labels(dataset: LocalDataset, labels: Sequence[str]) -> MatchedDataset:
    """Keep the examples whose label the model knows and whose image can be read.

    Names must be equal but for white space around them; their order never matters.

    Raises:
        DataError: No example to train on is left, or two of the model's labels are the same.
    """
    ids = _label_ids(labels)
    report = SkipReport()
    if isinstance(dataset, SelfCheckingDataset):
        report.merge(dataset.skipped)
    usable: dict[int, int] = {}
    for index in range(len(dataset)):
        problem = _problem_of(dataset, index, ids)
        if problem is None:
            usable[index] = ids[dataset.label_of(index).strip()]
        else:
            report.add(problem, dataset.key_of(index))
    train, held_out = _split(dataset, tuple(usable))
    if not train:
        raise _nothing_left(len(dataset), report, labels)
    _note_few_examples(report, labels, Counter(usable[index] for index in train))
    return MatchedDataset(dataset, train, held_out, usable, report)


def _label_ids(labels: Sequence[str]) -> dict[str, int]:
    ids = {label.strip(): label_id for label_id, label in enumerate(labels)}
    if len(ids) != len(labels):
        raise DataError("two labels of the model have the same name")
    return ids


def _problem_of(dataset: LocalDataset, index: int, ids: Mapping[str, int]) -> str | None:
    label = dataset.label_of(index).strip()
    if label not in ids:
        return f"label {label[:60]!r} is unknown to the model"
    return dataset.problem_of(index) if isinstance(dataset, SelfCheckingDataset) else None


def _split(
    dataset: LocalDataset, indices: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    stated = {index: dataset.is_held_out(index) for index in indices}
    held_out = {
        index
        for index, is_held_out in stated.items()
        if is_held_out or (is_held_out is None and is_held_out_by_key(dataset.key_of(index)))
    }
    if len(held_out) == len(indices):  # the keys left nothing to train on
        held_out = {index for index in held_out if stated[index]}
    train = tuple(index for index in indices if index not in held_out)
    return train, tuple(index for index in indices if index in held_out)


def _note_few_examples(report: SkipReport, labels: Sequence[str], counts: Counter[int]) -> None:
    for label_id, label in enumerate(labels):
        if counts[label_id] == 0:
            report.add("the model's label has no example to train on here", label)
        elif counts[label_id] < _FEW_EXAMPLES:
            report.add("label has too few examples to learn much from", label)


def _nothing_left(total: int, report: SkipReport, labels: Sequence[str]) -> DataError:
    shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")  # noqa: PLR2004
    found = f"none of the {total} local examples can be trained on" if total else "no example found"
    return DataError(
        f"{found}: {'; '.join(report)}" if report else found,
        remedy=f"Name the classes as the model does: {shown}.",
    )
