"""Measures the pieces of deltas on the disk: how long each is, and which way the others point.

Products are added block by block to as many sums side by side as a block has values, and these are
folded by halves: element by element, so they have the same bits on every machine. Memory is
bounded by the pieces at hand, whatever the number of deltas.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from io import FileIO
from pathlib import Path
from typing import Final

import numpy as np

from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_edge.protocol.layers import TensorKey
from fedra_server.piecewise import piece_groups
from fedra_server.screening import HOLDERS_FOR_COSINES, Measure
from fedra_server.server_optimizers import Float64Array
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import RevisionRecord
from fedra_server.summing import (
    Span,
    WeightedDelta,
    places_of,
    read_span,
    spans_of,
    sum_deltas,
)

_BLOCK_VALUES: Final = 2**14
"""So many values are read and multiplied while they are in the processor's cache."""

Holdings = Mapping[AssignmentId, tuple[ClientId, frozenset[str]]]
"""Who made each delta, and which of its pieces are measured."""


def folded_sum(values: Float64Array) -> float:
    """Add up values by adding one half to the other until one is left."""
    while values.size > 1:
        half = values.size // 2
        folded = values[:half] + values[half : 2 * half]
        if values.size % 2:
            folded[0] += values[-1]
        values = folded
    return float(values[0]) if values.size else 0.0


def measure(
    revision: RevisionRecord,
    holdings: Holdings,
    delta_file: Callable[[AssignmentId], Path],
    blobs: BlobStore,
) -> list[Measure]:
    """Measure every piece of every delta, by assignment and piece.

    Args:
        revision: Any revision of the run; it tells how large the pieces are.
        holdings: What to measure.
        delta_file: Finds the file of an admitted delta.
        blobs: Where the revision's blobs are.

    Raises:
        OSError: A delta is missing or cannot be read.
        ValueError: A delta does not hold what it was admitted with.
    """
    wanted = {piece for _, pieces in holdings.values() for piece in pieces}
    places = {index: piece for index, piece in enumerate(revision.pieces) if piece in wanted}
    found: list[Measure] = []
    for group in piece_groups(revision, places, blobs):
        sizes = {name: size for values in group.values() for name, size in values.items()}
        found += _Group(sizes, holdings, delta_file).measures()
    return sorted(found, key=lambda it: (it.assignment_id, it.piece))


class _Group:
    """Pieces that are measured together."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        holdings: Holdings,
        delta_file: Callable[[AssignmentId], Path],
    ) -> None:
        self._sizes, self._delta_file = sizes, delta_file
        self._spans = dict(_piece_spans(sizes))
        self._held = {
            assignment_id: (client_id, sorted(pieces & self._spans.keys()))
            for assignment_id, (client_id, pieces) in sorted(holdings.items())
        }
        self._counts = Counter(
            (client_id, piece) for client_id, pieces in self._held.values() for piece in pieces
        )

    def measures(self) -> Iterator[Measure]:
        norms = {key: math.sqrt(it) for key, it in self._products(self._spans.keys())}
        cosines = self._cosines(norms)
        for (assignment_id, piece), norm in norms.items():
            client_id, _ = self._held[assignment_id]
            cosine = cosines.get((assignment_id, piece))
            yield Measure(assignment_id, client_id, piece, norm, cosine)

    def _cosines(
        self, norms: Mapping[tuple[AssignmentId, str], float]
    ) -> dict[tuple[AssignmentId, str], float]:
        """Hold each delta's direction against the mean of the others', one say for each client."""
        clients = Counter(piece for _, piece in self._counts)
        judged = {it for it, count in clients.items() if count >= HOLDERS_FOR_COSINES}
        if not judged:
            return {}
        shares = {
            (assignment_id, piece): 1.0 / self._counts[self._held[assignment_id][0], piece]
            for assignment_id, piece in norms
        }
        directions = (
            WeightedDelta(
                self._delta_file(assignment_id),
                {
                    piece: shares[assignment_id, piece] / norms[assignment_id, piece]
                    for piece in pieces
                    if piece in judged and norms[assignment_id, piece] > 0
                },
            )
            for assignment_id, (_, pieces) in self._held.items()
        )
        total = sum_deltas(self._sizes, directions)
        lengths = {
            piece: folded_sum(total[span] * total[span])
            for piece, span in self._spans.items()
            if piece in judged
        }
        found = {}
        for key, product in self._products(judged, total):
            if norms[key] > 0:
                along = product / norms[key]
                rest = lengths[key[1]] - 2 * shares[key] * along + shares[key] ** 2
                if rest > 0:
                    cosine = (along - shares[key]) / math.sqrt(rest)
                    found[key] = min(max(cosine, -1.0), 1.0)
        return found

    def _products(
        self, wanted: AbstractSet[str], other: Float64Array | None = None
    ) -> Iterator[tuple[tuple[AssignmentId, str], float]]:
        """Read the deltas one after the other; multiply pieces with themselves or another sum."""
        places = list(places_of(self._sizes))
        product = _Product()
        for assignment_id, (_, pieces) in self._held.items():
            weights = {piece: 1.0 for piece in pieces if piece in wanted}
            if weights:
                with FileIO(self._delta_file(assignment_id)) as file:
                    spans = spans_of(file, places, weights)
                    for piece in weights:
                        place = self._spans[piece]
                        yield (assignment_id, piece), product.of(file, spans, place, other)


class _Product:
    """Multiplies values of files, a block at a time, in memory that is taken once."""

    def __init__(self) -> None:
        self._narrow = np.empty(_BLOCK_VALUES, dtype="<f4")
        self._wide = np.empty(_BLOCK_VALUES, dtype=np.float64)

    def of(
        self, file: FileIO, spans: Iterable[Span], place: slice, other: Float64Array | None
    ) -> float:
        """Give the scalar product of one place of the sum with itself or with another sum's."""
        near = [it for it in spans if it.start < place.stop and place.start < it.stop]
        sums = np.zeros(min(_BLOCK_VALUES, place.stop - place.start), dtype=np.float64)
        for start in range(place.start, place.stop, _BLOCK_VALUES):
            stop = min(start + _BLOCK_VALUES, place.stop)
            narrow, wide = self._narrow[: stop - start], self._wide[: stop - start]
            for span in near:
                first, last = max(start, span.start), min(stop, span.stop)
                if first < last:
                    read_span(file, span, first, narrow[first - start : last - start])
            np.copyto(wide, narrow)
            wide *= wide if other is None else other[start:stop]
            sums[: stop - start] += wide
        return folded_sum(sums)


def _piece_spans(sizes: Mapping[str, int]) -> Iterator[tuple[str, slice]]:
    """Give each piece's part of a sum; tensors of a piece lie behind each other."""
    start = stop = 0
    piece = ""
    for name, size in sizes.items():
        current = TensorKey.parse(name).piece
        if current != piece:
            if piece:
                yield piece, slice(start, stop)
            piece, start = current, stop
        stop += size
    if piece:
        yield piece, slice(start, stop)
