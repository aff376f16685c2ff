"""The number formats frozen weights are stored in; needs no framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.tensors import MalformedTensorsError, read_header
from fedra_server.errors import NotFoundError
from fedra_server.storage.blobs import BlobStore

WeightsDtype = Literal["float32", "bfloat16", "float16"]

_NAMES: Final[Mapping[str, WeightsDtype]] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}


def stored_dtype(spec: ModelSpec, blobs: BlobStore) -> WeightsDtype | None:
    """Tell how a model's frozen weights are stored, or None when its stem cannot be read.

    The stem stands for all pieces: nothing in it is trained, so all of it has this format.
    """
    try:
        stem = read_header(blobs.path(spec.stem.weights.sha256))
    except (OSError, NotFoundError, MalformedTensorsError):
        return None
    dtypes = {info.dtype for info in stem.values()}
    return _NAMES.get(dtypes.pop()) if len(dtypes) == 1 else None
