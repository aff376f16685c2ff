"""Writes predictions as CSV or as JSON lines, one after the other as they are computed."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import TextIO

from fedra_edge.durable_files import storage_errors
from fedra_edge.prediction import Prediction, Predictions


@contextlib.contextmanager
def prediction_file(path: Path | None) -> Iterator[TextIO]:
    """Open where predictions go: a file, or standard output; UTF-8 on every platform.

    Raises:
        StorageError: The file cannot be written.
    """
    if path is None:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", newline="")
        yield sys.stdout
        return
    with (
        storage_errors(f"write {path}"),
        path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        yield file


def write_predictions(predictions: Predictions, file: TextIO, *, as_json: bool) -> None:
    """Write all predictions, each as soon as there is one."""
    rows = csv.writer(file, lineterminator="\n")
    if not as_json:
        more = ((f"label_{n}", f"probability_{n}") for n in range(2, predictions.top + 1))
        rows.writerow(["key", "label", "probability", *chain.from_iterable(more)])
    for prediction in predictions:
        if as_json:
            file.write(json.dumps(_json_line(prediction)) + "\n")
        else:
            told = ((likely.label, f"{likely.probability:.6f}") for likely in prediction.top)
            rows.writerow([prediction.key, *chain.from_iterable(told)])
        file.flush()


def _json_line(prediction: Prediction) -> dict[str, object]:
    return {
        "event": "prediction",
        "key": prediction.key,
        "label": prediction.label,
        "probability": prediction.probability,
        "top": [likely._asdict() for likely in prediction.top],
    }
