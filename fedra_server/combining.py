"""Combines the values that the holders of a piece give for each coordinate, instead of a mean.

A coordinate median takes no weights, because a weight may be a claim. A trimmed mean cuts off the
same number of values at either end, whatever they weigh, and takes the weighted mean of the rest
(Yin et al., arXiv 1803.01498). With no more attackers than it bears, either lies between values
of honest holders, coordinate by coordinate.

All holders' values of one block are in memory at a time; blocks shrink as holders grow more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Final

import numpy as np

from fedra_edge.protocol.ids import AssignmentId
from fedra_server.runs import RunSpec
from fedra_server.server_optimizers import Float64Array
from fedra_server.storage.records import MergeRecord
from fedra_server.summing import Place, Span, places_of, read_span, spans_of

_BLOCK_VALUES: Final = 2**19
"""So many values of all holders together are combined at once."""

Combine = Callable[[Float64Array, Float64Array], Float64Array]
"""Maps values, a row for each holder, and the holders' weights to one value a coordinate."""


def combination(spec: RunSpec) -> Combine | None:
    """Give what a run combines values by; None for a weighted mean."""
    match spec.merge:
        case "mean" | "norm-clipped-mean":
            return None
        case "coordinate-median":
            return coordinate_median
        case "trimmed-mean":
            return lambda values, weights: trimmed_mean(values, weights, spec.trimmed(len(values)))


def coordinate_median(values: Float64Array, weights: Float64Array) -> Float64Array:
    """Give the middle value of each coordinate, or the mean of the two in the middle."""
    del weights
    count = len(values)
    ordered = np.sort(values, axis=0)
    middle: Float64Array = ordered[count // 2]
    return middle if count % 2 else (ordered[count // 2 - 1] + middle) / 2


def trimmed_mean(values: Float64Array, weights: Float64Array, trimmed: int) -> Float64Array:
    """Give the weighted mean of each coordinate without so many values at either end.

    Equal values are in the order of their rows, and what is left is added in that order.
    """
    count = len(values)
    order = np.argsort(values, axis=0, kind="stable")
    is_kept = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(is_kept, order[trimmed : count - trimmed], values=True, axis=0)
    total, divisor = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for row, weight, kept in zip(values, weights, is_kept, strict=True):
        total += np.where(kept, weight * row, 0.0)
        divisor += np.where(kept, weight, 0.0)
    mean: Float64Array = total / divisor
    return mean


def combine_deltas(
    sizes: Mapping[str, int],
    merges: Sequence[MergeRecord],
    delta_file: Callable[[AssignmentId], Path],
    combine: Combine,
) -> Float64Array:
    """Combine deltas from disk, piece by piece and block by block.

    Args:
        sizes: How many values each tensor has; the results lie behind each other in this order.
        merges: By assignment; their files hold every tensor here of the pieces merged of them.
        delta_file: Finds the file of an admitted delta.
        combine: What makes one value of the holders'.

    Raises:
        ValueError: A file does not hold what it was admitted with.
    """
    places = list(places_of(sizes))
    combined = np.zeros(places[-1].stop if places else 0, dtype=np.float64)
    for piece, group in groupby(places, key=lambda place: place.piece):
        holders = [merge for merge in merges if merge.piece == piece]
        own = list(group)
        spans = [_spans(delta_file(it.assignment_id), own, it) for it in holders]
        weights = np.array([it.weight for it in holders])
        step = max(_BLOCK_VALUES // len(holders), 1)
        for first in range(own[0].start, own[-1].stop, step):
            last = min(first + step, own[-1].stop)
            rows = [
                _row(delta_file(it.assignment_id), some, first, last)
                for it, some in zip(holders, spans, strict=True)
            ]
            combined[first:last] = combine(np.stack(rows), weights)
    return combined


def _spans(path: Path, places: Sequence[Place], merge: MergeRecord) -> list[Span]:
    with FileIO(path) as file:
        return spans_of(file, places, {merge.piece: merge.scale})


def _row(path: Path, spans: Sequence[Span], first: int, last: int) -> Float64Array:
    """Read one holder's values of a block, scaled."""
    row = np.empty(last - first, dtype=np.float64)
    with FileIO(path) as file:
        for span in spans:
            start, stop = max(first, span.start), min(last, span.stop)
            if start < stop:
                values = np.empty(stop - start, dtype="<f4")
                read_span(file, span, start, values)
                row[start - first : stop - first] = values
                row[start - first : stop - first] *= span.weight
    return row
