"""A real server in this process, on a real port and home, and sites that speak plain HTTP."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
from pydantic import BaseModel

from fedra_edge.protocol import routes
from fedra_edge.protocol.deltas import DeltaManifest, TrainingReport
from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.ids import RunId
from fedra_edge.protocol.messages import EnrolReceipt, EnrolRequest, UploadStatus
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.rounds import Train
from fedra_edge.protocol.routes import Route
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import FloatArray, serialize_tensors
from fedra_edge.protocol.version import PROTOCOL_HEADER, PROTOCOL_VERSION
from fedra_server.config import ServerConfig, ServerHome
from fedra_server.http.services import Services, free_disk_bytes
from fedra_server.http.serving import GracefulServer, build_services, listen, url_of
from fedra_server.publishing import initial_revision
from fedra_server.runs import RunState
from fedra_server.storage.records import RunRecord
from fedra_server.storage.store import Store
from tests.support.builders import make_model_spec, make_profile, make_run_spec

PROTOCOL = {PROTOCOL_HEADER: PROTOCOL_VERSION}
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Site:
    """An enrolled client, or one that pretends to be, and its connection."""

    client_id: str
    credential: str
    http: httpx.Client

    def call(
        self,
        route: Route,
        body: BaseModel | None = None,
        *,
        parts: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | Iterable[bytes] | None = None,
    ) -> httpx.Response:
        """Make one call of the wire contract."""
        sent = dict(headers or {})
        if body is not None:
            content = body.model_dump_json().encode()
            sent["Content-Type"] = "application/json"
        path = route.fill(**(parts or {}))
        return self.http.request(route.method, path, params=params, headers=sent, content=content)

    def work(self, wait_s: float = 10.0) -> SliceManifest:
        """Poll until there is something to train."""
        answer = self.call(routes.ASSIGNMENT, params={"wait_s": str(wait_s)})
        assert answer.json()["kind"] == "train", answer.text
        return Train.model_validate_json(answer.content).manifest

    def announce(self, delta: Delta) -> UploadStatus:
        """Announce a delta; it must be welcome."""
        answer = self.call(routes.UPLOAD_CREATE, delta.manifest)
        assert answer.status_code == 201, answer.text
        return UploadStatus.model_validate_json(answer.content)

    def append(
        self,
        upload_id: str,
        content: bytes | Iterable[bytes],
        *,
        offset: int = 0,
        complete: bool = True,
    ) -> httpx.Response:
        """Send bytes of a delta."""
        headers = {
            routes.UPLOAD_OFFSET_HEADER: str(offset),
            routes.UPLOAD_COMPLETE_HEADER: "?1" if complete else "?0",
        }
        return self.call(
            routes.UPLOAD_APPEND, parts={"upload_id": upload_id}, headers=headers, content=content
        )

    def send(self, delta: Delta) -> httpx.Response:
        """Announce a delta and send all of it."""
        return self.append(self.announce(delta).upload_id, delta.data)


@dataclass(frozen=True)
class Delta:
    """The bytes of a delta and what is said of them."""

    data: bytes
    manifest: DeltaManifest

    @classmethod
    def of(cls, data: bytes, assignment_id: str) -> Delta:
        """Describe any bytes as the delta of an assignment."""
        report = TrainingReport(
            steps=3,
            first_loss=2.0,
            last_loss=1.0,
            train_s=0.5,
            peak_memory_bytes=10**8,
            bytes_received=1000,
            bytes_sent=1000,
        )
        manifest = DeltaManifest(
            assignment_id=assignment_id,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            num_examples=10,
            report=report,
        )
        return cls(data, manifest)


@dataclass(frozen=True)
class Headquarters:
    """A server that runs, and its inside for what an operator would do."""

    url: str
    services: Services
    spec: ModelSpec

    @contextmanager
    def connection(self, headers: Mapping[str, str]) -> Iterator[httpx.Client]:
        """Open a connection of its own to the server."""
        with httpx.Client(base_url=self.url, headers=dict(headers), timeout=_TIMEOUT_S) as http:
            yield http

    @contextmanager
    def site(self, name: str, run: str | None = None, *, calibrated: bool = True) -> Iterator[Site]:
        """Enrol a client over HTTP; it leaves at the end."""
        with self.connection(PROTOCOL) as http:
            profile = make_profile(memory_bytes=2**40, baseline_bytes=10**8)
            stranger = Site("", "", http)
            answer = stranger.call(routes.ENROL, EnrolRequest(name=name, profile=profile, run=run))
            assert answer.status_code == 201, answer.text
            receipt = EnrolReceipt.model_validate_json(answer.content)
            http.headers["Authorization"] = f"Bearer {receipt.credential}"
            site = Site(receipt.client_id, receipt.credential, http)
            if calibrated:
                answer = site.call(routes.CALIBRATE, calibration_of(self.spec))
                assert answer.status_code == 204, answer.text
            yield site
            site.call(routes.LEAVE)

    def create_run(self, name: str, **options: object) -> RunRecord:
        """Create a run and start it."""
        services = self.services
        run_spec = make_run_spec(**options)
        now = services.clock.now()
        record = RunRecord(RunId(name), self.spec.model_id, run_spec, RunState.CREATED, now)
        revision = initial_revision(self.spec, record.run, run_spec, services.blobs, now)
        services.store.add_run(record, revision)
        services.store.set_run_state(record.run, RunState.RUNNING, allowed_from={RunState.CREATED})
        services.coordinator.wake()
        return record

    def delta_tensors(self, manifest: SliceManifest) -> dict[str, FloatArray]:
        """Make the tensors of an honest delta."""
        shapes = self.spec.delta_shapes(manifest.adapter, manifest.trained_layer_ids)
        generator = np.random.default_rng(7)
        return {
            name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
        }

    def delta(self, manifest: SliceManifest) -> Delta:
        """Make an honest delta."""
        return Delta.of(serialize_tensors(self.delta_tensors(manifest)), manifest.assignment_id)


def calibration_of(spec: ModelSpec) -> Calibration:
    """Make the calibration of a quick machine."""
    return Calibration(
        model_id=spec.model_id,
        forward_s=1e-5,
        backward_s=2e-5,
        train_examples=100,
        held_out_examples=10,
    )


@contextmanager
def headquarters(
    home: ServerHome, config: ServerConfig, free_bytes: Callable[[Path], int] = free_disk_bytes
) -> Iterator[Headquarters]:
    """Serve a home with everything real, on a thread, with one model registered."""
    home.create()
    with ExitStack() as stack:
        listener = stack.enter_context(listen("127.0.0.1", 0))
        store = Store.open(home.path)
        stack.callback(store.close)
        services = replace(build_services(home, config, store), free_bytes=free_bytes)
        spec = _register_model(services)
        services.coordinator.start()
        stack.callback(services.coordinator.stop)
        ready = threading.Event()
        server = GracefulServer(services, on_ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        stack.callback(thread.join)
        stack.callback(setattr, server, "should_exit", True)
        assert ready.wait(_TIMEOUT_S)
        yield Headquarters(url_of(listener, "127.0.0.1"), services, spec)


def home_in(directory: Path) -> ServerHome:
    """Name a server's home below a test's directory."""
    return ServerHome(directory / "server")


def _register_model(services: Services) -> ModelSpec:
    """Register a tiny model whose pieces are real blobs."""
    spec = make_model_spec(num_layers=4)
    generator = np.random.default_rng(3)
    head = {
        name: generator.normal(size=shape).astype(np.float32)
        for name, shape in spec.head_parameters.items()
    }
    blob = services.blobs.put_bytes(serialize_tensors(head))
    spec = spec.model_copy(update={"head": spec.head.model_copy(update={"weights": blob})})
    services.store.add_model(spec, services.clock.now())
    return spec
