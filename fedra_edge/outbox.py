"""Trained deltas on disk from before the first attempt to send until the server has them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from fedra_edge.durable_files import (
    UNFINISHED,
    StateFile,
    clear_place,
    set_aside,
    storage_errors,
    write_durably,
    write_synced,
)
from fedra_edge.errors import StorageError
from fedra_edge.protocol.deltas import DeltaManifest, TrainingReport
from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.files import sha256_of_file
from fedra_edge.protocol.ids import AssignmentId

LOGGER: Final = logging.getLogger(__name__)
_TENSORS: Final = ".safetensors"
_MANIFEST: Final = ".json"
_DAMAGED: Final = "damaged"
_STAMP_STEP_NS: Final = 1000


@dataclass(frozen=True)
class Parcel:
    """A delta that waits to be sent; nobody has tried that yet with a new one."""

    manifest: DeltaManifest
    file: Path
    is_new: bool = False


class Outbox:
    """A directory with two files per delta; the manifest is written last and makes it complete.

    What this process has written, and nobody has touched since, is not read to be sent.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: dict[AssignmentId, tuple[Parcel, tuple[int, ...]]] = {}

    def put(
        self,
        assignment_id: AssignmentId,
        tensors: Sequence[bytes | memoryview],
        *,
        num_examples: int,
        report: TrainingReport,
    ) -> Parcel:
        """Keep a delta that comes in parts; on return it survives a crash.

        Raises:
            StorageError: It cannot be written.
        """
        digest = sha256()
        for part in tensors:
            digest.update(part)
        manifest = DeltaManifest(
            assignment_id=assignment_id,
            sha256=digest.hexdigest(),
            size_bytes=sum(map(len, tensors)),
            num_examples=num_examples,
            report=report,
        )
        file, place = (self._file(assignment_id, suffix) for suffix in (_TENSORS, _MANIFEST))
        stored = StateFile().model_dump() | manifest.model_dump(mode="json")
        with storage_errors(f"tidy up {self._directory}"):
            self._drop_unfinished()  # tensors whose manifest the disk did not take
        for path in (file, place):
            clear_place(path, self._directory / _DAMAGED)
        write_synced(file, tensors)  # the manifest's name lasts with this one's
        fault_point("outbox.tensors")
        write_durably(place, json.dumps(stored).encode())
        self._make_newest(place)
        fault_point("outbox.kept")
        parcel = Parcel(manifest, file, is_new=True)
        with storage_errors(f"write {place}"):
            self._written[assignment_id] = parcel, self._stamps(assignment_id)
        return parcel

    def _make_newest(self, path: Path) -> None:
        """Let a file come last in time, also when the clock has gone back since the others."""
        with storage_errors(f"write {path}"):
            own_ns = path.stat().st_mtime_ns
            newest_ns = max(
                (other.stat().st_mtime_ns for other in self._manifests() if other != path),
                default=0,
            )
            if newest_ns >= own_ns:
                os.utime(path, ns=(newest_ns + _STAMP_STEP_NS, newest_ns + _STAMP_STEP_NS))

    def _manifests(self) -> list[Path]:
        return [path for path in self._files() if path.suffix == _MANIFEST]

    def _files(self) -> list[Path]:
        try:
            return list(self._directory.iterdir())
        except FileNotFoundError:
            return []

    def _stamps(self, assignment_id: AssignmentId) -> tuple[int, ...]:
        """Tell what a write to either file of a delta would change."""
        states = [self._file(assignment_id, suffix).stat() for suffix in (_TENSORS, _MANIFEST)]
        return tuple(it for state in states for it in (state.st_size, state.st_ctime_ns))

    def parcels(self) -> list[Parcel]:
        """Read what waits, the oldest first; what is damaged is set aside in ``damaged/``.

        What can be neither read nor set aside, on a full disk perhaps, is left for the next time.
        """
        with storage_errors(f"read {self._directory}"):
            self._drop_unfinished()
            manifests = sorted(self._manifests(), key=lambda path: path.stat().st_mtime_ns)
        parcels = [self._look_at(path) for path in manifests]
        return [parcel for parcel in parcels if parcel is not None]

    @property
    def num_waiting(self) -> int:
        """Count what waits, without a look inside."""
        return len(self._manifests())

    def has(self, assignment_id: AssignmentId) -> bool:
        """Tell whether this assignment's delta waits to be sent."""
        return self._file(assignment_id, _MANIFEST).exists()

    def remove(self, assignment_id: AssignmentId) -> None:
        """Drop a delta that the server has."""
        with storage_errors(f"tidy up {self._directory}"):
            self._file(assignment_id, _MANIFEST).unlink(missing_ok=True)
            self._file(assignment_id, _TENSORS).unlink(missing_ok=True)
        self._written.pop(assignment_id, None)

    def postpone(self, assignment_id: AssignmentId) -> None:
        """Let a delta wait behind all others."""
        self._make_newest(self._file(assignment_id, _MANIFEST))

    def refuse(self, assignment_id: AssignmentId) -> None:
        """Move a delta that the server does not want to ``refused/``, where it stays."""
        self._set_aside(assignment_id, "refused")

    def _drop_unfinished(self) -> None:
        """Remove what a process that was killed did not complete."""
        for path in self._files():
            is_orphan = path.suffix == _TENSORS and not self.has(AssignmentId(path.stem))
            if path.suffix == UNFINISHED or (is_orphan and path.is_file()):
                path.unlink()

    def _look_at(self, path: Path) -> Parcel | None:
        try:
            return self._read(path)
        except StorageError as error:
            LOGGER.warning("the delta of assignment %s is left alone: %s", path.stem, error)
            return None

    def _read(self, path: Path) -> Parcel | None:
        assignment_id = AssignmentId(path.stem)
        file = self._file(assignment_id, _TENSORS)
        with (
            storage_errors(f"read {path}"),
            contextlib.suppress(ValidationError, FileNotFoundError, IsADirectoryError),
        ):
            parcel, stamps = self._written.get(assignment_id, (None, ()))
            if parcel is not None and stamps == self._stamps(assignment_id):
                self._written[assignment_id] = replace(parcel, is_new=False), stamps
                return parcel
            content = path.read_bytes()
            StateFile.model_validate_json(content)
            manifest = DeltaManifest.model_validate_json(content)
            is_whole = file.stat().st_size == manifest.size_bytes
            if (
                is_whole
                and manifest.id == assignment_id
                and sha256_of_file(file) == manifest.sha256
            ):
                return Parcel(manifest, file)
        self._set_aside(assignment_id, _DAMAGED)
        LOGGER.warning(
            "the delta of assignment %s is damaged or of a newer version; it was set aside in %s",
            assignment_id,
            self._directory / _DAMAGED,
        )
        return None

    def _set_aside(self, assignment_id: AssignmentId, folder: str) -> None:
        self._written.pop(assignment_id, None)
        for suffix in (_MANIFEST, _TENSORS):
            path = self._file(assignment_id, suffix)
            if path.exists():
                set_aside(path, self._directory / folder)

    def _file(self, assignment_id: AssignmentId, suffix: str) -> Path:
        return self._directory / f"{assignment_id}{suffix}"
