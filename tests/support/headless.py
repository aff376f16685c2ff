"""A server without HTTP: real store, blobs and coordinator, a clock moved by hand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fedra_edge.protocol.files import sha256_of_file
from fedra_edge.protocol.ids import AssignmentId, ClientId, RunId, UploadId
from fedra_edge.protocol.messages import DeltaReceipt
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.tensors import FloatArray, serialize_tensors
from fedra_server.config import ServerConfig, ServerHome
from fedra_server.coordinator import Coordinator
from fedra_server.publishing import initial_revision
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import AssignmentRecord, RunRecord, UploadRecord
from fedra_server.storage.store import Store
from tests.support.builders import (
    NOW,
    RUN,
    make_calibration,
    make_client,
    make_delta,
    make_model_spec,
    make_profile,
    make_run_spec,
)


@dataclass
class HandClock:
    """A clock that moves only when told to."""

    time: float = NOW

    def now(self) -> float:
        return self.time


@dataclass
class Headless:
    """A home with one model and, once created, one run; clients that send random deltas."""

    path: Path
    clock: HandClock = field(default_factory=HandClock)

    def __post_init__(self) -> None:
        self.home = ServerHome(self.path)
        self.home.create()
        self.blobs = BlobStore(self.home.blobs)
        self.store = Store.open(self.path)
        self.config = ServerConfig()
        self.coordinator = self.restarted()

    def restarted(self) -> Coordinator:
        """Start over on the same home, as after a crash."""
        self.coordinator = Coordinator(self.store, self.blobs, self.home, self.config, self.clock)
        return self.coordinator

    def create_run(self, state: RunState = RunState.RUNNING, **fields: object) -> RunRecord:
        spec = self._with_head(make_model_spec())
        self.store.add_model(spec, NOW)
        run_spec = make_run_spec(**fields)
        run = RunRecord(RunId(RUN), spec.model_id, run_spec, state, NOW)
        self.store.add_run(run, initial_revision(spec, run.run, run_spec, self.blobs, NOW))
        return run

    def enrol(self, name: str, **profile: object) -> ClientId:
        client = replace(make_client(name), profile=make_profile(**profile))
        self.store.add_client(client, public_key=name.ljust(64, "0"))
        spec = self.store.model(self.store.run(RUN).model_id).spec
        self.store.set_calibration(client.client_id, make_calibration(spec))
        return client.client_id

    def assignments(self, round_number: int) -> dict[str, AssignmentRecord]:
        """Give a round's latest assignment of each client."""
        records = self.store.assignments(RUN, round_number)
        return {record.client_id: record for record in records}

    def states(self, round_number: int) -> dict[str, AssignmentState]:
        records = self.assignments(round_number)
        return {client_id: record.state for client_id, record in records.items()}

    def deliver(
        self, assignment: AssignmentRecord, *, fill: float | None = None, seed: int = 1
    ) -> DeltaReceipt:
        """Send a delta as a client would: random values, or all of them ``fill``."""
        upload = self.announce(assignment, fill=fill, seed=seed)
        part = self.home.upload_part(upload.upload_id)
        return self.coordinator.intake.admit(upload, part)

    def announce(
        self, assignment: AssignmentRecord, *, fill: float | None = None, seed: int = 1
    ) -> UploadRecord:
        spec = self.store.model(self.store.run(RUN).model_id).spec
        manifest = assignment.manifest
        generator = np.random.default_rng(seed)
        tensors: dict[str, FloatArray] = {
            name: (
                generator.normal(size=shape).astype(np.float32)
                if fill is None
                else np.full(shape, fill, dtype=np.float32)
            )
            for name, shape in spec.delta_shapes(
                manifest.adapter, manifest.trained_layer_ids
            ).items()
        }
        upload_id = UploadId(f"upload-{assignment.assignment_id}-{seed}")
        part = self.home.upload_part(upload_id)
        part.write_bytes(serialize_tensors(tensors))
        delta = make_delta(
            assignment.assignment_id, sha256=sha256_of_file(part), size_bytes=part.stat().st_size
        )
        return UploadRecord(
            upload_id, AssignmentId(assignment.assignment_id), assignment.client_id, delta, NOW
        )

    def _with_head(self, spec: ModelSpec) -> ModelSpec:
        generator = np.random.default_rng(5)
        tensors = {
            name: generator.normal(size=shape).astype(np.float32)
            for name, shape in spec.head_parameters.items()
        }
        weights = self.blobs.put_bytes(serialize_tensors(tensors))
        head = spec.head.model_copy(update={"weights": weights})
        return spec.model_copy(update={"head": head})
