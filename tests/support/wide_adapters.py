"""A model whose adapters have the size of ViT-B/16's, 2 MB, and whose weights have none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedra_edge.protocol.models import AdapterSpec, BlobRef, ModelSpec, Piece
from fedra_edge.protocol.tensors import FloatArray, serialize_tensors
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.builders import make_adapter, make_model_spec

_LAYERS = 12
_WIDTH = 768


def wide_adapter() -> AdapterSpec:
    """Give adapters of rank 8."""
    return make_adapter(rank=8)


def register_wide_model(store: Store, blobs: BlobStore) -> ModelSpec:
    """Register the model, with real blobs for all its pieces."""
    spec = make_model_spec(
        _LAYERS,
        block_linears={"attention.o_proj": (_WIDTH, _WIDTH), "mlp.fc2": (_WIDTH, 4 * _WIDTH)},
    )
    weightless = _store(blobs, {"weight": np.zeros(1, dtype=np.float32)})
    head = {name: np.zeros(shape, dtype=np.float32) for name, shape in spec.head_parameters.items()}
    spec = spec.model_copy(
        update={
            "stem": _with(spec.stem, weightless),
            "layers": tuple(_with(layer, weightless) for layer in spec.layers),
            "head": _with(spec.head, _store(blobs, head)),
        }
    )
    store.add_model(spec, 0.0)
    return spec


def _with(piece: Piece, weights: BlobRef) -> Piece:
    return piece.model_copy(update={"weights": weights})


def _store(blobs: BlobStore, tensors: Mapping[str, FloatArray]) -> BlobRef:
    return blobs.put_bytes(serialize_tensors(tensors))
