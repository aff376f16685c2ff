"""Makes revisions: the untrained first one, and the one that a round's deltas merge into.

Each layer's adapters are a blob of their own, so a layer that nobody trained keeps its blob and
with it every bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedra_edge.protocol.ids import LayerId, RevisionNumber, RunId
from fedra_edge.protocol.layers import HEAD, LORA_A, TensorKey, layer_piece
from fedra_edge.protocol.models import BlobRef, ModelSpec
from fedra_edge.protocol.slices import RevisionManifest
from fedra_edge.protocol.tensors import (
    FloatArray,
    TensorInfo,
    read_header,
    read_tensor,
    read_tensors,
    serialize_tensors,
)
from fedra_server.merging import (
    Contributor,
    head_weight,
    in_merge_order,
    layer_weight,
    merge_piece,
)
from fedra_server.runs import RunSpec
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import RevisionRecord


@dataclass(frozen=True)
class Contribution:
    """An admitted delta: who made it, which layers it trained, and its file."""

    contributor: Contributor
    layer_ids: tuple[LayerId, ...]
    path: Path


def initial_revision(
    spec: ModelSpec, run: RunId, run_spec: RunSpec, blobs: BlobStore, now: float
) -> RevisionRecord:
    """Publish revision 0, which changes nothing: lora_b is zero, the head is the base's.

    ``lora_a`` is uniform in +-1/sqrt(in_features), the distribution that peft starts from.
    """
    generator = np.random.default_rng([run_spec.seed, 0])
    layers = []
    for layer_id in spec.layer_ids:
        tensors: dict[str, FloatArray] = {}
        for name, shape in spec.layer_adapter_shapes(run_spec.adapter, layer_id).items():
            bound = 1 / math.sqrt(shape[1]) if name.endswith(LORA_A) else 0.0
            tensors[name] = generator.uniform(-bound, bound, size=shape).astype(np.float32)
        layers.append(blobs.put_bytes(serialize_tensors(tensors)))
    base_head = read_tensors(blobs.path(spec.head.weights.sha256))
    head = {str(TensorKey(HEAD, name)): base_head[name] for name in spec.head_parameters}
    manifest = RevisionManifest(
        number=RevisionNumber(0),
        layers=tuple(layers),
        head=blobs.put_bytes(serialize_tensors(head)),
    )
    return RevisionRecord(run, manifest, (0,) * spec.num_layers, now)


def merged_revision(
    base: RevisionRecord,
    contributions: Sequence[Contribution],
    run_spec: RunSpec,
    blobs: BlobStore,
    *,
    round_number: int,
    now: float,
) -> RevisionRecord:
    """Merge a round's deltas into the revision after ``base``, one piece at a time."""
    readers = _Readers(contributions)
    weighting, cap = run_spec.merge_weighting, run_spec.max_inverse_chance
    layers = list(base.manifest.layers)
    last_trained = list(base.last_trained)
    for layer_id, blob in enumerate(base.manifest.layers):
        weights = {
            contribution: layer_weight(weighting, contribution.contributor, cap)
            for contribution in readers.contributions
            if layer_id in contribution.layer_ids
        }
        if weights:
            layers[layer_id] = readers.merge(layer_piece(LayerId(layer_id)), blob, weights, blobs)
            last_trained[layer_id] = round_number
    head_weights = {
        contribution: head_weight(weighting, contribution.contributor)
        for contribution in readers.contributions
    }
    manifest = RevisionManifest(
        number=RevisionNumber(base.manifest.number + 1),
        layers=tuple(layers),
        head=readers.merge(HEAD, base.manifest.head, head_weights, blobs),
    )
    return RevisionRecord(base.run, manifest, tuple(last_trained), now)


class _Readers:
    """The deltas of a round in merge order, with their headers read once."""

    def __init__(self, contributions: Sequence[Contribution]) -> None:
        by_id = {item.contributor.assignment_id: item for item in contributions}
        ordered = in_merge_order(item.contributor for item in contributions)
        self.contributions = [by_id[contributor.assignment_id] for contributor in ordered]
        self._headers = {item: read_header(item.path) for item in self.contributions}

    def merge(
        self, piece: str, base: BlobRef, weights: Mapping[Contribution, float], blobs: BlobStore
    ) -> BlobRef:
        """Merge one piece and store it; the base is unchanged on disk."""
        tensors = read_tensors(blobs.path(base.sha256))
        if any(TensorKey.parse(name).piece != piece for name in tensors):
            raise ValueError(f"blob {base.sha256} does not hold {piece}")
        readers = [(weight, self._reader(item)) for item, weight in weights.items()]
        return blobs.put_bytes(serialize_tensors(merge_piece(tensors, readers)))

    def _reader(self, contribution: Contribution) -> _TensorReader:
        return _TensorReader(contribution.path, self._headers[contribution])


@dataclass(frozen=True)
class _TensorReader:
    path: Path
    infos: Mapping[str, TensorInfo]

    def __call__(self, name: str) -> FloatArray:
        return read_tensor(self.path, self.infos[name])
