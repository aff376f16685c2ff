"""Adds up weighted deltas from disk in float64, through chunks that stay in the processor's cache.

The values of a file whose tensors lie in the order of the sum are read in long spans, and some
files at a time are added to one chunk of the sum before the next chunk is looked at. Each value
is still the sum of its terms in the order of the deltas, so neither leaves a trace in any bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from fedra_edge.protocol.layers import TensorKey
from fedra_edge.protocol.tensors import MAX_HEADER_BYTES, FloatArray
from fedra_server.server_optimizers import Float64Array

_CHUNK_VALUES: Final = 2**16
_FILES_AT_ONCE: Final = 16
_LENGTH_BYTES: Final = 8
_FLOAT32_BYTES: Final = 4


@dataclass(frozen=True)
class WeightedDelta:
    """The file of an admitted delta, and the weight of each of its pieces that is added."""

    path: Path
    weights: Mapping[str, float]


class Place(NamedTuple):
    """A tensor's place in the sum."""

    name: str
    piece: str
    start: int
    stop: int


class Span(NamedTuple):
    """Values ``start`` to ``stop`` of the sum, whose first term lies at ``offset`` in a file."""

    start: int
    stop: int
    offset: int
    weight: float

    def goes_on_in(self, span: Span) -> bool:
        """Tell whether another span follows this one in the sum and in the file alike."""
        end = self.offset + _FLOAT32_BYTES * (self.stop - self.start)
        return (span.start, span.offset, span.weight) == (self.stop, end, self.weight)


def sum_deltas(sizes: Mapping[str, int], deltas: Iterable[WeightedDelta]) -> Float64Array:
    """Add weight times delta over the deltas, in their order.

    Args:
        sizes: How many values each tensor has; the sums lie behind each other in this order.
        deltas: Admitted files, which hold every tensor here of the pieces they have weights of.

    Raises:
        ValueError: A file does not hold what it was admitted with.
    """
    places = list(places_of(sizes))
    total = np.zeros(places[-1].stop if places else 0, dtype=np.float64)
    waiting = iter(deltas)
    while group := list(islice(waiting, _FILES_AT_ONCE)):
        with ExitStack() as stack:
            files = [stack.enter_context(FileIO(delta.path)) for delta in group]
            terms = [
                (file, spans_of(file, places, delta.weights))
                for file, delta in zip(files, group, strict=True)
            ]
            _add(total, terms)
    return total


def read_span(file: FileIO, span: Span, first: int, values: FloatArray) -> None:
    """Fill an array with a span's values from ``first`` on.

    Raises:
        ValueError: The file is shorter than that.
    """
    file.seek(span.offset + _FLOAT32_BYTES * (first - span.start))
    if file.readinto(values.data) != values.nbytes:
        raise ValueError(f"{file.name!r} is shorter than its header says")


def places_of(sizes: Mapping[str, int]) -> Iterator[Place]:
    """Give the place of each tensor; they lie behind each other."""
    stop = 0
    for name, size in sizes.items():
        start, stop = stop, stop + size
        yield Place(name, TensorKey.parse(name).piece, start, stop)


def _add(total: Float64Array, terms: list[tuple[FileIO, list[Span]]]) -> None:
    """Add the terms to the sum, chunk by chunk."""
    chunk = np.empty(_CHUNK_VALUES, dtype="<f4")
    scratch = np.empty(_CHUNK_VALUES, dtype=np.float64)
    for start in range(0, total.size, _CHUNK_VALUES):
        stop = min(start + _CHUNK_VALUES, total.size)
        for file, spans in terms:
            for span in spans:
                first, last = max(start, span.start), min(stop, span.stop)
                if first >= last:
                    continue
                values, wide = chunk[: last - first], scratch[: last - first]
                read_span(file, span, first, values)
                if span.weight == 1.0:
                    total[first:last] += values
                    continue
                np.copyto(wide, values)
                wide *= span.weight
                total[first:last] += wide


def spans_of(file: FileIO, places: Sequence[Place], weights: Mapping[str, float]) -> list[Span]:
    """Find the wanted tensors of a file; neighbours of one weight become one span."""
    spans: list[Span] = []
    for span in _tensors(file, places, weights):
        last = spans[-1] if spans else None
        if last is not None and last.goes_on_in(span):
            spans[-1] = Span(last.start, span.stop, last.offset, last.weight)
        else:
            spans.append(span)
    return spans


def _tensors(file: FileIO, places: Sequence[Place], weights: Mapping[str, float]) -> Iterator[Span]:
    """Find each wanted tensor by the file's header."""
    header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"{file.name!r} has a header of {header_bytes} bytes")
    entries = json.loads(file.read(header_bytes))
    for place in places:
        weight = weights.get(place.piece)
        if weight is None:
            continue
        try:
            begin, end = entries[place.name]["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file.name!r} holds no tensor {place.name}") from error
        if end - begin != _FLOAT32_BYTES * (place.stop - place.start):
            raise ValueError(f"{file.name!r} holds {place.name} in another size")
        yield Span(place.start, place.stop, _LENGTH_BYTES + header_bytes + begin, weight)
