"""Tells two models apart without loading either, so that a refusal needs no framework."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.tensors import MalformedTensorsError, read_header, read_tensor
from fedra_server.errors import ConfigurationError
from fedra_server.modelbook.stored_dtypes import WeightsDtype, stored_dtype
from fedra_server.storage.blobs import BlobStore

_SINGLE_FILE: Final = "model.safetensors"
_FLOAT32: Final = "F32"


def check_directory(directory: Path) -> None:
    """Make sure that a directory looks like a saved transformers model.

    Raises:
        ConfigurationError: It is missing, or has no config.json.
    """
    remedy = "Give a directory as written by save_pretrained of transformers."
    if not directory.is_dir():
        raise ConfigurationError(f"there is no directory {directory}", remedy=remedy)
    if not (directory / "config.json").is_file():
        raise ConfigurationError(f"{directory} has no config.json", remedy=remedy)


def surely_differs(
    directory: Path, weights_dtype: WeightsDtype, known: ModelSpec, blobs: BlobStore
) -> bool:
    """Tell whether a saved model would not become a registered one.

    Its weights would be stored in another dtype, or its head is another one in some tensor
    that is stored unrounded. False when they may be the same: they agree in both, or the file
    is one that only transformers can read.
    """
    if stored_dtype(known, blobs) not in {weights_dtype, None}:
        return True
    path = directory / _SINGLE_FILE
    head = blobs.path(known.head.weights.sha256)
    if not path.is_file() or not head.is_file():
        return False
    try:
        saved = read_header(path)
        if any(info.dtype != _FLOAT32 for info in saved.values()):
            return False
        unrounded = (info for info in read_header(head).values() if info.dtype == _FLOAT32)
        for info in unrounded:
            wanted = read_tensor(head, info).tobytes()
            same_shape = [it for it in saved.values() if it.shape == info.shape]
            if all(read_tensor(path, it).tobytes() != wanted for it in same_shape):
                return True
    except (OSError, MalformedTensorsError):
        return False
    return False
