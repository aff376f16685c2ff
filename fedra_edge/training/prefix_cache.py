"""Keeps what leaves the frozen layers below a slice's trained ones, for later epochs.

Those layers give the same output for an example as long as a slice is trained, so a second epoch
can read it from disk, when that is quicker than to compute it again.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final, Self

import numpy as np

from fedra_edge.protocol.tensors import FloatArray

LOGGER: Final = logging.getLogger(__name__)


class PrefixCache:
    """A file of one row per example; a row is float32 and of the same shape for all examples.

    Args:
        file: Where rows are kept.
        max_bytes: The most that the file may grow to.
    """

    def __init__(self, file: io.FileIO, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._places: dict[int, int] = {}
        self._row_shape: tuple[int, ...] = ()
        self._is_worthwhile: bool | None = None

    @classmethod
    @contextmanager
    def opened(cls, directory: Path, max_bytes: int) -> Iterator[Self]:
        """Open an empty cache in a directory that exists; its file vanishes with the process."""
        with TemporaryFile(dir=directory, buffering=0) as file:
            yield cls(file, max_bytes)

    def load(self, indices: Sequence[int]) -> FloatArray | None:
        """Read the rows of these examples, shape (n, ...); None when any of them is not here."""
        if not all(index in self._places for index in indices):
            return None
        rows = np.empty((len(indices), *self._row_shape), dtype=np.float32)
        for row, index in zip(rows, indices, strict=True):
            self._file.seek(self._places[index] * row.nbytes)
            if self._file.readinto(row.data) != row.nbytes:
                raise OSError("the file of kept activations is shorter than what was written")
        return rows

    def store(self, indices: Sequence[int], rows: FloatArray, computed_s: float) -> None:
        """Keep the rows of these examples, as far as there is room and it saves time.

        The first rows decide: when writing them took longer than ``computed_s``, which is what
        computing them took, no more are kept. A disk that is full only ends the keeping.
        """
        if self._is_worthwhile is False:
            return
        started = time.perf_counter()
        try:
            self._write(indices, rows)
        except OSError as error:
            LOGGER.info("activations cannot be kept any more: %s", error)
            self._is_worthwhile = False
            return
        if self._is_worthwhile is None:
            self._is_worthwhile = time.perf_counter() - started < computed_s

    def _write(self, indices: Sequence[int], rows: FloatArray) -> None:
        self._row_shape = rows.shape[1:]
        for index, row in zip(indices, rows, strict=True):
            place = len(self._places)
            if index in self._places or (place + 1) * row.nbytes > self._max_bytes:
                continue
            self._file.seek(place * row.nbytes)
            if self._file.write(np.ascontiguousarray(row).data) < row.nbytes:
                raise OSError("the disk took only part of the kept activations")
            self._places[index] = place
