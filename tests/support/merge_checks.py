"""Recomputes a revision, plainly, from its base and what the records say was merged into it."""

from __future__ import annotations

import numpy as np

from fedra_edge.protocol.layers import TensorKey
from fedra_edge.protocol.tensors import FloatArray, read_tensors
from fedra_server.config import ServerHome
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store


def read_adapters(store: Store, blobs: BlobStore, run: str, number: int) -> dict[str, FloatArray]:
    """Give all tensors of a revision."""
    tensors: dict[str, FloatArray] = {}
    for ref in store.revision(run, number).blobs:
        tensors |= read_tensors(blobs.path(ref.sha256))
    return tensors


def check_revision(store: Store, blobs: BlobStore, home: ServerHome, run: str, number: int) -> None:
    """Check that a revision is its base plus the weighted means of the deltas of its merges."""
    base = read_adapters(store, blobs, run, number - 1)
    found = read_adapters(store, blobs, run, number)
    merges = store.merges(run, number)
    assert merges, f"revision {number} of {run} merges nothing"
    assert base.keys() == found.keys()
    merged = {merge.assignment_id for merge in merges}
    deltas = {it: read_tensors(home.delta_file(it)) for it in merged}
    for name, value in found.items():
        weights = {
            merge.assignment_id: merge.weight
            for merge in merges
            if merge.piece == TensorKey.parse(name).piece
        }
        if weights:
            total = sum(deltas[it][name].astype(np.float64) * w for it, w in weights.items())
            expected = base[name] + total / sum(weights.values())
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(value, base[name], err_msg=name)
