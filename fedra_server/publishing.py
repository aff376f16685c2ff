"""Makes revisions: the untrained first one, and those that deltas merge into.

Each layer's adapters are a blob of their own, so a layer that nobody trained keeps its blob and
with it every bit. So does the server optimizer's state of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from fedra_edge.protocol.ids import AssignmentId, LayerId, RevisionNumber, RunId
from fedra_edge.protocol.layers import HEAD, LORA_A, TensorKey, layer_piece
from fedra_edge.protocol.models import BlobRef, ModelSpec
from fedra_edge.protocol.slices import RevisionManifest
from fedra_edge.protocol.tensors import FloatArray, read_tensors, serialize_tensors, tensor_parts
from fedra_server.combining import combination
from fedra_server.merging import Contributor, PieceState, piece_weight
from fedra_server.piecewise import flat_moments, merged_pieces
from fedra_server.runs import RunSpec
from fedra_server.screening import examples_caps
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import MergeRecord, RevisionRecord

Scales = Mapping[tuple[AssignmentId, str], float]
NO_SCALES: Final[Scales] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Arrival:
    """An admitted delta: who made it, which of its pieces are not merged yet, and its file.

    ``base_versions`` are those of the revision that it was trained from.
    """

    contributor: Contributor
    pieces: tuple[str, ...]
    base_versions: tuple[int, ...]
    path: Path


@lru_cache(maxsize=1024)
def trained_pieces(layer_ids: tuple[LayerId, ...]) -> tuple[str, ...]:
    """Name the pieces of the delta of a slice that trains these layers."""
    return (*(layer_piece(layer_id) for layer_id in layer_ids), HEAD)


def initial_pieces(
    spec: ModelSpec, run_spec: RunSpec, blobs: BlobStore
) -> Iterator[dict[str, FloatArray]]:
    """Give the tensors that each piece starts from: lora_b is zero, the head is the base's.

    ``lora_a`` is uniform in +-1/sqrt(in_features), the distribution that peft starts from.
    """
    generator = np.random.default_rng([run_spec.seed, 0])
    for layer_id in spec.layer_ids:
        tensors: dict[str, FloatArray] = {}
        for name, shape in spec.layer_adapter_shapes(run_spec.adapter, layer_id).items():
            bound = 1 / math.sqrt(shape[1]) if name.endswith(LORA_A) else 0.0
            tensors[name] = generator.uniform(-bound, bound, size=shape).astype(np.float32)
        yield tensors
    base_head = read_tensors(blobs.path(spec.head.weights.sha256))
    yield {str(TensorKey(HEAD, name)): base_head[name] for name in spec.head_parameters}


def initial_revision(
    spec: ModelSpec, run: RunId, run_spec: RunSpec, blobs: BlobStore, now: float
) -> RevisionRecord:
    """Publish revision 0, which changes nothing."""
    pieces = initial_pieces(spec, run_spec, blobs)
    *layers, head = [blobs.put_bytes(serialize_tensors(tensors)) for tensors in pieces]
    versions = (0,) * (spec.num_layers + 1)
    return RevisionRecord(
        run=run,
        manifest=RevisionManifest(
            number=RevisionNumber(0), layers=tuple(layers), head=head, versions=versions
        ),
        last_trained=(0,) * spec.num_layers,
        published_at=now,
        versions=versions,
        moments=(None,) * len(versions),
    )


def merged_revision(  # noqa: PLR0913 - a merge and its rules
    base: RevisionRecord,
    arrivals: Sequence[Arrival],
    run_spec: RunSpec,
    blobs: BlobStore,
    *,
    now: float,
    due_pieces: Collection[str] | None = None,
    scales: Scales = NO_SCALES,
) -> tuple[RevisionRecord, list[MergeRecord]]:
    """Merge what arrived of the due pieces, by default of all, into the revision after ``base``.

    What has a scale is multiplied by it.

    Raises:
        ValueError: Nothing arrived of any due piece.
    """
    merges = weigh(base, arrivals, run_spec, due_pieces, scales)
    if not merges:
        raise ValueError("a revision needs at least one delta of a piece that is due")
    paths = {arrival.contributor.assignment_id: arrival.path for arrival in arrivals}
    return apply_merges(base, merges, paths.__getitem__, run_spec, blobs, now=now), merges


def weigh(
    base: RevisionRecord,
    arrivals: Sequence[Arrival],
    run_spec: RunSpec,
    due_pieces: Collection[str] | None = None,
    scales: Scales = NO_SCALES,
) -> list[MergeRecord]:
    """Say what the next revision merges and how heavy, whatever the order of arrival."""
    place = {piece: index for index, piece in enumerate(base.pieces)}
    caps = examples_caps(
        run_spec,
        ((piece, it.contributor.num_examples) for it in arrivals for piece in it.pieces),
    )
    merges = []
    for arrival in sorted(arrivals, key=lambda arrival: arrival.contributor.assignment_id):
        for piece in arrival.pieces:
            if due_pieces is None or piece in due_pieces:
                index = place[piece]
                staleness = base.versions[index] - arrival.base_versions[index]
                contributor = arrival.contributor
                weight = piece_weight(run_spec, contributor, piece, staleness, caps[piece])
                scale = scales.get((contributor.assignment_id, piece), 1.0)
                merges.append(
                    MergeRecord(
                        contributor.assignment_id, piece, base.run,
                        base.manifest.number + 1, weight, staleness, scale,
                    )
                )  # fmt: skip
    return merges


def apply_merges(
    base: RevisionRecord,
    merges: Sequence[MergeRecord],
    delta_file: Callable[[AssignmentId], Path],
    run_spec: RunSpec,
    blobs: BlobStore,
    *,
    now: float,
) -> RevisionRecord:
    """Make the revision after ``base`` out of weighed deltas, and store its blobs."""
    number = RevisionNumber(base.manifest.number + 1)
    pieces, moments = list(base.blobs), list(base.moments)
    last_trained, versions = list(base.last_trained), list(base.versions)
    optimizer, combine = run_spec.server_optimizer, combination(run_spec)
    for states in merged_pieces(base, merges, delta_file, optimizer, blobs, combine=combine):
        for index, (piece, moment) in zip(states, _store(states.values(), blobs), strict=True):
            pieces[index], moments[index] = piece, moment
            versions[index] += 1
            if index < len(last_trained):
                last_trained[index] = number
    manifest = RevisionManifest(
        number=number, layers=tuple(pieces[:-1]), head=pieces[-1], versions=tuple(versions)
    )
    return RevisionRecord(
        base.run, manifest, tuple(last_trained), now, tuple(versions), tuple(moments)
    )


def _store(
    states: Collection[PieceState], blobs: BlobStore
) -> Iterator[tuple[BlobRef, BlobRef | None]]:
    """Store states, and the moments of those that have some, all at once."""
    moved = [flat_moments(state) for state in states if state.moments]
    files = [tensor_parts(it) for it in (*(state.tensors for state in states), *moved)]
    stored = iter(blobs.put_all(files))
    pieces = [next(stored) for _ in states]
    for state, piece in zip(states, pieces, strict=True):
        yield piece, next(stored) if state.moments else None
