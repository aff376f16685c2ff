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
from fedra_edge.data.preparing import (
    Inputs,
    WrongKindError,
    image_of,
    prepare_example,
    text_of,
)
from fedra_edge.data.tokenizing import TextTokenizer, padded
from fedra_edge.errors import DataError
from fedra_edge.protocol.models import ImageInput, ModelInput

_FEW_EXAMPLES: Final = 2


@dataclass(frozen=True)
class MatchedDataset:
    """The usable examples of a dataset, by index, split into a training and a held-out part.

    ``label_ids`` maps the index of each usable example to its place in the model's label list.
    ``tokenizer`` is that of a model that reads texts.
    """

    dataset: LocalDataset
    train_indices: tuple[int, ...]
    held_out_indices: tuple[int, ...]
    label_ids: Mapping[int, int]
    report: SkipReport = field(default_factory=SkipReport)
    tokenizer: TextTokenizer | None = None

    def batch(
        self, indices: Sequence[int] | NDArray[np.int64], wanted: ModelInput
    ) -> tuple[Inputs, NDArray[np.int64]]:
        """Read examples as the model eats them.

        Returns:
            Images of shape (n, channels, size, size), or token ids of shape (n, tokens) with
            ``PADDING`` at the end of shorter texts, and label ids of shape (n,).

        Raises:
            DataError: An example that could be read before cannot be read any more.
        """
        plain = [int(index) for index in indices]
        inputs: Inputs
        if isinstance(wanted, ImageInput):
            size = (wanted.channels, wanted.size_px, wanted.size_px)
            inputs = np.empty((len(plain), *size), dtype=np.float32)
            for row, index in enumerate(plain):
                inputs[row] = self._prepared(index, wanted)
        else:
            inputs = padded([self._prepared(index, wanted) for index in plain])
        return inputs, np.asarray([self.label_ids[index] for index in plain], dtype=np.int64)

    def labels_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the label ids of examples, of shape (n,), without reading them."""
        return np.asarray([self.label_ids[int(index)] for index in indices], dtype=np.int64)

    def _prepared(self, index: int, wanted: ModelInput) -> Inputs:
        try:
            return prepare_example(self.dataset[index], wanted, self.tokenizer)
        except (DataError, OSError) as error:
            raise DataError(
                f"{self.dataset.key_of(index)} cannot be read: {error}",
                remedy="Keep the data in place while a run is going on.",
            ) from error


def match_labels(
    dataset: LocalDataset, labels: Sequence[str], tokenizer: TextTokenizer | None = None
) -> MatchedDataset:
    """Keep the examples whose label the model knows and that can be read.

    Names must be equal but for white space around them; their order never matters. A model that
    reads texts comes with its ``tokenizer``.

    Raises:
        DataError: No example to train on is left, or two of the model's labels are the same.
        WrongKindError: The data are images and the model reads texts, or the other way round.
    """
    ids = _label_ids(labels)
    _check_kind(dataset, reads_texts=tokenizer is not None)
    report = SkipReport()
    if isinstance(dataset, SelfCheckingDataset):
        report.merge(dataset.skipped)
    usable: dict[int, int] = {}
    for index in range(len(dataset)):
        problem = _problem_of(dataset, index, ids)
        if problem is None and tokenizer is not None:
            problem = _problem_of_text(dataset, index, tokenizer, report)
        if problem is None:
            usable[index] = ids[dataset.label_of(index).strip()]
        else:
            report.add(problem, dataset.key_of(index))
    train, held_out = _split(dataset, tuple(usable))
    if not train:
        raise _nothing_left(dataset, ids, len(usable), report)
    _note_few_examples(report, labels, Counter(usable[index] for index in train))
    return MatchedDataset(dataset, train, held_out, usable, report, tokenizer)


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


def _problem_of_text(
    dataset: LocalDataset, index: int, tokenizer: TextTokenizer, report: SkipReport
) -> str | None:
    """Look at a text as the model will, and note when it does not see all of it."""
    try:
        if tokenizer.cuts(text_of(dataset[index])):
            report.add(f"text was cut after {tokenizer.max_tokens} tokens", dataset.key_of(index))
    except WrongKindError:
        raise
    except (DataError, OSError) as error:
        return str(error)
    return None


def _check_kind(dataset: LocalDataset, *, reads_texts: bool) -> None:
    """Look at the first example that can be read; the others are taken to be of its kind."""
    for index in range(len(dataset)):
        try:
            example = dataset[index]
        except (DataError, OSError):
            continue
        _ = text_of(example) if reads_texts else image_of(example)
        return


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


def _nothing_left(
    dataset: LocalDataset, ids: Mapping[str, int], num_usable: int, report: SkipReport
) -> DataError:
    """Say why there is nothing to train on, with the remedies that its causes call for."""
    total = len(dataset)
    num_known = sum(dataset.label_of(index).strip() in ids for index in range(total))
    remedies = []
    if num_known < total or not total:
        shown = ", ".join(list(ids)[:10]) + (", ..." if len(ids) > 10 else "")  # noqa: PLR2004
        remedies.append(f"Name the classes as the model does: {shown}.")
    if num_usable < num_known:
        remedies.append("Give whole files that the user who runs the client may read.")
    if num_usable:
        remedies.append("Hold out fewer examples, so that some are left to train on.")
    found = f"none of the {total} local examples can be trained on" if total else "no example found"
    told = f"{found}: {'; '.join(report)}" if report else found
    return DataError(told, remedy=" ".join(remedies))
