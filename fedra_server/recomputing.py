"""Computes a published revision once more, and finds the first bit in which it differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.models import BlobRef, ModelSpec
from fedra_edge.protocol.tensors import FloatArray, read_header, read_tensor
from fedra_server.combining import combination
from fedra_server.piecewise import flat_moments, merged_pieces
from fedra_server.publishing import initial_pieces
from fedra_server.runs import RunSpec
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import MergeRecord, RevisionRecord

Tensors = Mapping[str, FloatArray]


class Difference(BaseModel):
    """The first value that is not what the records lead to; an index of None means a whole tensor.

    ``recorded`` is what the revision has, ``recomputed`` what it should have; None for nothing.
    """

    model_config = ConfigDict(frozen=True)

    run: str
    revision: int
    piece: str
    tensor: str
    index: tuple[int, ...] | None
    recorded: float | str | None
    recomputed: float | str | None


def first_difference_of_start(
    revision: RevisionRecord, spec: ModelSpec, run_spec: RunSpec, blobs: BlobStore
) -> Difference | None:
    """Draw revision 0 again."""
    for index, tensors in enumerate(initial_pieces(spec, run_spec, blobs)):
        found = _first_of_piece(revision, index, tensors, {}, blobs)
        if found is not None:
            return found
    return None


def first_difference(
    base: RevisionRecord,
    revision: RevisionRecord,
    merges: Sequence[MergeRecord],
    delta_file: Callable[[AssignmentId], Path],
    *,
    run_spec: RunSpec,
    blobs: BlobStore,
) -> Difference | None:
    """Merge the recorded deltas into the base again.

    Raises:
        NotFoundError: A blob is missing.
        OSError: A delta is missing or cannot be read.
        ValueError: A blob or delta does not hold what it should.
    """
    optimizer, combine = run_spec.server_optimizer, combination(run_spec)
    for states in merged_pieces(base, merges, delta_file, optimizer, blobs, combine=combine):
        for index, state in states.items():
            found = _first_of_piece(revision, index, state.tensors, flat_moments(state), blobs)
            if found is not None:
                return found
    return None


def _first_of_piece(
    revision: RevisionRecord, index: int, tensors: Tensors, moments: Tensors, blobs: BlobStore
) -> Difference | None:
    """Compare a piece's adapters and its moments."""
    pairs = ((revision.blobs[index], tensors), (revision.moments[index], moments))
    for blob, recomputed in pairs:
        for tensor, place, was, would_be in _differences(blob, recomputed, blobs):
            return Difference(
                run=revision.run,
                revision=revision.manifest.number,
                piece=revision.pieces[index],
                tensor=tensor,
                index=place,
                recorded=was,
                recomputed=would_be,
            )
    return None


def _differences(
    blob: BlobRef | None, recomputed: Tensors, blobs: BlobStore
) -> Iterator[tuple[str, tuple[int, ...] | None, float | str | None, float | str | None]]:
    """Compare a stored file with what it should hold, bit for bit, in the order of names."""
    path = None if blob is None else blobs.path(blob.sha256)
    infos = {} if path is None else read_header(path)
    for name in sorted(infos.keys() | recomputed.keys()):
        if path is None or name not in infos:
            yield name, None, None, "a tensor"
            continue
        recorded = read_tensor(path, infos[name])
        if name not in recomputed:
            yield name, None, "a tensor", None
            continue
        expected = recomputed[name]
        if (recorded.dtype, recorded.shape) != (expected.dtype, expected.shape):
            yield name, None, str(recorded.shape), str(expected.shape)
            continue
        unlike = recorded.view(np.uint32) != expected.view(np.uint32)
        if unlike.any():
            flat = int(np.argmax(unlike))
            place = tuple(int(axis) for axis in np.unravel_index(flat, unlike.shape))
            yield name, place, float(recorded[place]), float(expected[place])
