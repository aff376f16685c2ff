"""Keeps a training on disk as it goes on, so that a power cut costs little of it.

A checkpoint is one safetensors file. Its metadata say how far the training was, which training
it was, and the sha256 of the whole file as it is with zeros in that place. It is written array by
array, none of them copied.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict
from typing_extensions import override

from fedra_edge.data.matching import MatchedDataset
from fedra_edge.durable_files import set_aside, write_parts_durably
from fedra_edge.errors import StorageError
from fedra_edge.protocol.devices import Backend
from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.files import iterate_chunks
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import TensorInfo, read_header, read_tensor
from fedra_edge.protocol.wire import HexDigest
from fedra_edge.training.engine import AnyArray

LOGGER: Final = logging.getLogger(__name__)
_SHARE: Final = 50
"""Between two saves training goes on for so many times what a save takes, which makes 2 %."""
_LEAST_SAVE_S: Final = 0.1
"""What a save is taken to last at least, so that nothing under 5 s of training is saved."""
_DTYPES: Final = {"<f4": "F32", "<i8": "I64"}
_LENGTH_BYTES: Final = 8
_NO_DIGEST: Final = "0" * 64

State = Callable[[], Iterable[tuple[str, AnyArray]]]
"""Shows all arrays that later steps depend on, by name, as often as it is called."""


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Progress(_Stored):
    """How far a training is; losses are means per example of the first and the last step."""

    steps: int = 0
    num_drawn: int = 0
    first_loss: float = 0.0
    last_loss: float = 0.0
    train_s: float = 0.0

    def after(self, loss: float, num_drawn: int, train_s: float) -> Self:
        """Count one more step."""
        return self.model_copy(
            update={
                "steps": self.steps + 1,
                "num_drawn": self.num_drawn + num_drawn,
                "first_loss": self.first_loss if self.steps else loss,
                "last_loss": loss,
                "train_s": train_s,
            }
        )


class _Binding(_Stored):
    """Which training a checkpoint is of: only the very same one can go on from it."""

    backend: Backend
    manifest: HexDigest
    examples: HexDigest


class _Description(_Stored):
    """What a checkpoint says of itself; a file of another version is not understood."""

    version: Literal[1] = 1
    binding: _Binding
    progress: Progress


class _Metadata(_Stored):
    checkpoint: str
    sha256: HexDigest


@dataclass(frozen=True)
class StoredState(Mapping[str, AnyArray]):
    """The arrays of a checkpoint that was found sound; each is read when it is looked up."""

    path: Path
    infos: Mapping[str, TensorInfo]
    progress: Progress

    @override
    def __getitem__(self, name: str) -> AnyArray:
        return read_tensor(self.path, self.infos[name])

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    @override
    def __len__(self) -> int:
        return len(self.infos)


class Checkpoint:
    """The checkpoint of one training; without a path there is none, and nothing is kept."""

    def __init__(
        self, path: Path | None, manifest: SliceManifest, data: MatchedDataset, backend: Backend
    ) -> None:
        self._path = path
        self._manifest = manifest
        self._data = data
        self._backend = backend
        self._saved_steps = 0
        self._saved_at = time.perf_counter()
        self._save_s = _LEAST_SAVE_S
        self._has_failed = False

    def load(self) -> StoredState | None:
        """Find where to go on; a file that is of no use is moved out of the way, and that told."""
        if self._path is None or not self._path.exists():
            return None
        try:
            stored, binding = _read(self._path)
        except (OSError, ValueError) as error:
            LOGGER.debug("%s is no checkpoint of ours: %s", self._path, error)
            _make_way(self._path, "is damaged or of another version")
            return None
        if binding != self._binding():
            _make_way(self._path, "is of another training")
            return None
        self._saved_steps = stored.progress.steps
        return stored

    @property
    def is_due(self) -> bool:
        """Whether enough has been trained since the last save to make the next one worthwhile."""
        return time.perf_counter() - self._saved_at >= _SHARE * self._save_s

    def save(self, progress: Progress, state: State) -> None:
        """Keep what has been reached; when the disk does not take it, training goes on without."""
        if self._path is None or progress.steps == self._saved_steps:
            return
        started = time.perf_counter()
        description = _Description(binding=self._binding(), progress=progress)
        try:
            write_parts_durably(self._path, _parts(description.model_dump_json(), state))
        except StorageError as error:
            level = logging.DEBUG if self._has_failed else logging.WARNING
            LOGGER.log(level, "training goes on, but would start anew after a crash: %s", error)
            self._has_failed = True
        else:
            fault_point("checkpoint.saved")
            self._saved_steps = progress.steps
        self._saved_at = time.perf_counter()
        self._save_s = max(_LEAST_SAVE_S, self._saved_at - started)

    def _binding(self) -> _Binding:
        manifest = self._manifest.model_dump_json(exclude={"remaining_s"})
        examples = hashlib.sha256()
        for index in self._data.train_indices:
            key, label_id = self._data.dataset.key_of(index), self._data.label_ids[index]
            examples.update(f"{index} {label_id} {key!r}\n".encode())
        return _Binding(
            backend=self._backend,
            manifest=hashlib.sha256(manifest.encode()).hexdigest(),
            examples=examples.hexdigest(),
        )


def drop_checkpoints(directory: Path, *, but: Path | None = None) -> None:
    """Remove every checkpoint in a directory except one, half-written ones as well."""
    for path in directory.glob("*.safetensors*"):
        if path != but and path.is_file():
            try:
                path.unlink()
            except OSError as error:
                LOGGER.warning("the checkpoint %s cannot be removed: %s", path, error)


def _make_way(path: Path, reason: str) -> None:
    try:
        kept_at = set_aside(path, path.parent / "damaged")
    except StorageError as error:
        LOGGER.warning("the checkpoint %s %s; training starts anew; %s", path, reason, error)
    else:
        LOGGER.warning("the checkpoint %s; kept as %s, training starts anew", reason, kept_at)


def _parts(description: str, state: State) -> Iterator[bytes | memoryview]:
    """Give the file in parts; the state is gone through for header, digest and content."""
    header = _header(description, state())
    digest = hashlib.sha256(header)
    for _, array in state():
        digest.update(_bytes_of(array))
    yield header.replace(_NO_DIGEST.encode(), digest.hexdigest().encode(), 1)
    for _, array in state():
        yield _bytes_of(array)
        fault_point("checkpoint.begun")


def _header(description: str, state: Iterable[tuple[str, AnyArray]]) -> bytes:
    entries: dict[str, object] = {
        "__metadata__": _Metadata(checkpoint=description, sha256=_NO_DIGEST).model_dump()
    }
    end = 0
    for name, array in state:
        start, end = end, end + array.nbytes
        entries[name] = {
            "dtype": _DTYPES[array.dtype.str],
            "shape": array.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _bytes_of(array: AnyArray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read(path: Path) -> tuple[StoredState, _Binding]:
    """Read all of a file but its arrays, once its digest is found right.

    Raises:
        ValueError: It is no checkpoint, is damaged, or of another version.
    """
    infos = read_header(path)
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        header = prefix + file.read(int.from_bytes(prefix, "little"))
    metadata = _Metadata.model_validate(json.loads(header[_LENGTH_BYTES:]).get("__metadata__"))
    without = header.replace(metadata.sha256.encode(), _NO_DIGEST.encode(), 1)
    digest = hashlib.sha256(without)
    content_bytes = path.stat().st_size - len(header)
    for chunk in iterate_chunks(path, len(header), content_bytes):
        digest.update(chunk)
    if digest.hexdigest() != metadata.sha256:
        raise ValueError("the digest is not that of the content")
    description = _Description.model_validate_json(metadata.checkpoint)
    return StoredState(path, infos, description.progress), description.binding
