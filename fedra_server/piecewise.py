"""Takes merges through the disk a few pieces at a time: base and deltas in, next states out.

Memory is bounded by the pieces at hand, whatever the number and size of the deltas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Final

from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.layers import TensorKey
from fedra_edge.protocol.models import BlobRef
from fedra_edge.protocol.tensors import FloatArray, TensorInfo, read_header, read_tensors
from fedra_server.combining import Combine, combine_deltas
from fedra_server.merging import PieceState, merge_piece
from fedra_server.runs import ServerOptimizerSpec
from fedra_server.server_optimizers import Float64Array, moment_names
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import MergeRecord, RevisionRecord
from fedra_server.summing import WeightedDelta, sum_deltas

_VALUES_AT_ONCE: Final = 2**20
"""Pieces are summed together up to so many values, or one by one when they have more."""


def merged_pieces(
    base: RevisionRecord,
    merges: Sequence[MergeRecord],
    delta_file: Callable[[AssignmentId], Path],
    optimizer: ServerOptimizerSpec,
    blobs: BlobStore,
    *,
    combine: Combine | None = None,
) -> Iterator[dict[int, PieceState]]:
    """Give each merged piece's next state by its place in a revision, a few pieces at a time.

    Args:
        base: The revision that is merged into.
        merges: By assignment and, within it, in any order.
        delta_file: Finds the file of an admitted delta.
        optimizer: How the mean of the deltas moves a piece.
        blobs: Where the base's blobs are; nothing is written.
        combine: What takes the place of the weighted mean, value by value.
    """
    merged = {merge.piece for merge in merges}
    wanted = {index: piece for index, piece in enumerate(base.pieces) if piece in merged}
    for group in piece_groups(base, wanted, blobs):
        sizes = {name: size for values in group.values() for name, size in values.items()}
        pieces = {wanted[index] for index in group}
        held = [merge for merge in merges if merge.piece in pieces]
        if combine is None:
            total = sum_deltas(sizes, _weighted(held, delta_file))
        else:
            total = combine_deltas(sizes, held, delta_file, combine)
        sums = dict(_split(total, sizes))
        yield {
            index: merge_piece(
                piece_state(base, index, optimizer, blobs),
                sums,
                _weights(held, wanted[index]) if combine is None else (1.0,),
                optimizer,
            )
            for index in group
        }


def _weights(merges: Iterable[MergeRecord], piece: str) -> Iterator[float]:
    return (merge.weight for merge in merges if merge.piece == piece)


def _split(total: Float64Array, sizes: Mapping[str, int]) -> Iterator[tuple[str, Float64Array]]:
    """Give each tensor's part of a sum, without copying it."""
    stop = 0
    for name, size in sizes.items():
        start, stop = stop, stop + size
        yield name, total[start:stop]


def piece_state(
    revision: RevisionRecord, index: int, optimizer: ServerOptimizerSpec, blobs: BlobStore
) -> PieceState:
    """Read the state that a revision has of a piece."""
    tensors = read_tensors(blobs.path(revision.blobs[index].sha256))
    moments = revision.moments[index]
    if moments is None:
        return PieceState(tensors, {})
    flat = read_tensors(blobs.path(moments.sha256))
    names = moment_names(optimizer)
    return PieceState(
        tensors, {name: {it: flat[f"{name}.{it}"] for it in names} for name in tensors}
    )


def flat_moments(state: PieceState) -> dict[str, FloatArray]:
    """Name the moments of a piece as they are stored."""
    return {
        f"{name}.{moment}": values
        for name, moments in state.moments.items()
        for moment, values in moments.items()
    }


def piece_groups(
    base: RevisionRecord, wanted: Mapping[int, str], blobs: BlobStore
) -> Iterator[dict[int, dict[str, int]]]:
    """Divide the wanted pieces, in the order of their names, into those summed together."""
    group: dict[int, dict[str, int]] = {}
    group_values = 0
    for index, piece in sorted(wanted.items(), key=lambda item: item[1]):
        sizes = _sizes(base.blobs[index], piece, blobs)
        values = sum(sizes.values())
        if group and group_values + values > _VALUES_AT_ONCE:
            yield group
            group, group_values = {}, 0
        group[index] = sizes
        group_values += values
    if group:
        yield group


def _sizes(blob: BlobRef, piece: str, blobs: BlobStore) -> dict[str, int]:
    """Give how many values each tensor of a piece has, in the order of their names."""
    return _sizes_in(blobs.path(blob.sha256), piece)


@lru_cache(maxsize=1024)
def _sizes_in(path: Path, piece: str) -> dict[str, int]:
    infos: dict[str, TensorInfo] = read_header(path)
    if any(TensorKey.parse(name).piece != piece for name in infos):
        raise ValueError(f"blob {path.name} does not hold {piece}")
    return {name: info.size_bytes // 4 for name, info in sorted(infos.items())}


def _weighted(
    merges: Sequence[MergeRecord], delta_file: Callable[[AssignmentId], Path]
) -> Iterator[WeightedDelta]:
    """Give each delta with the weights of its pieces, in the order of assignments."""
    for assignment_id, rows in groupby(merges, key=lambda merge: merge.assignment_id):
        weights = {row.piece: row.weight * row.scale for row in rows}
        yield WeightedDelta(delta_file(assignment_id), weights)
