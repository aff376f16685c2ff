"""Evaluates an exported model on labelled local data, without a server."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.errors import MemoryShortError, SliceError
from fedra_edge.exports import damaged, open_export
from fedra_edge.profiling import NO_CAPS, SiteCaps, measure_usable_memory
from fedra_edge.training import EvaluationCounts, Trainer, load_trainer


def evaluate_export(
    directory: Path,
    data: MatchedDataset,
    trainer: Trainer | None = None,
    caps: SiteCaps = NO_CAPS,
) -> EvaluationCounts:
    """Count right answers of an exported model on local data.

    Where the data itself says which examples are held out, those are counted; else all are,
    because nothing here was trained on them.

    Raises:
        ConfigurationError: The directory is no export, or a damaged one.
        BackendUnavailableError: No training runtime is installed.
    """
    model = open_export(directory)
    counted = replace(data, held_out_indices=_counted_indices(data))
    computing = trainer or load_trainer()
    usable_memory = partial(measure_usable_memory, caps)
    try:
        return computing.evaluate(model, counted, lambda: False, usable_memory)
    except MemoryShortError:
        raise
    except SliceError as error:
        raise damaged(model.spec, error) from error


def _counted_indices(data: MatchedDataset) -> tuple[int, ...]:
    usable = tuple(sorted((*data.train_indices, *data.held_out_indices)))
    stated = tuple(index for index in usable if data.dataset.is_held_out(index))
    return stated or usable
