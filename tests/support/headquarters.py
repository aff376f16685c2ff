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
from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.ids import RunId
from fedra_edge.protocol.messages import UploadStatus
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.rounds import Train
from fedra_edge.protocol.routes import Route
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import FloatArray, serialize_tensors
from fedra_edge.protocol.version import PROTOCOL_HEADER, PROTOCOL_VERSION
from fedra_server.addressing import is_secured, url_of
from fedra_server.clock import SystemClock
from fedra_server.config import ServerConfig, ServerHome
from fedra_server.http.securing import ServerTls
from fedra_server.http.services import Services, free_disk_bytes
from fedra_server.http.serving import GracefulServer, build_services, listen, port_of
from fedra_server.publishing import initial_revision
from fedra_server.runs import RunState
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.records import RunRecord
from fedra_server.storage.store import Store
from tests.support.builders import (
    make_block_memory,
    make_model_spec,
    make_run_spec,
    make_training_report,
)
from tests.support.keys import SiteKey, enrol_key, open_session

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
        report = make_training_report()
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
    def site(self, name: str, run: str | None = None, *, calibrated: bool = True) -> Iterator[Site]:
        """Enrol a client over HTTP; it leaves at the end."""
        with connection(self.url) as http:
            site = enrol(http, name, run)
            if calibrated:
                calibrate(site, self.spec)
            yield site
            site.call(routes.LEAVE)

    @contextmanager
    def run(self, name: str, **options: object) -> Iterator[RunRecord]:
        """Create a run and start it; it is stopped at the end."""
        services = self.services
        record = create_run(services.store, services.blobs, self.spec, name, **options)
        services.coordinator.wake()
        yield record
        self.set_state(record.run, RunState.STOPPED)

    def set_state(self, run: str, state: RunState) -> None:
        """Do what the operator's commands do."""
        self.services.store.set_run_state(run, state, allowed_from=set(RunState))
        self.services.coordinator.wake()

    def delta(self, manifest: SliceManifest) -> Delta:
        """Make an honest delta."""
        return honest_delta(self.spec, manifest)


@contextmanager
def connection(url: str, headers: Mapping[str, str] = PROTOCOL) -> Iterator[httpx.Client]:
    """Open a connection of its own to a server."""
    with httpx.Client(base_url=url, headers=dict(headers), timeout=_TIMEOUT_S) as http:
        yield http


def enrol(http: httpx.Client, name: str, run: str | None = None) -> Site:
    """Become a client; the connection carries its session from then on."""
    key = SiteKey()
    return sign_in(http, key, enrol_key(http, key, name, run))


def sign_in(http: httpx.Client, key: SiteKey, client_id: str) -> Site:
    """Begin a session as a client; a server that was started again knows none from before."""
    session = open_session(http, key, client_id)
    http.headers["Authorization"] = f"Bearer {session}"
    return Site(client_id, session, http)


def calibrate(site: Site, spec: ModelSpec) -> None:
    """Report a quick machine."""
    calibration = Calibration(
        model_id=spec.model_id,
        forward_s=1e-5,
        backward_s=2e-5,
        memory=make_block_memory(),
        train_examples=100,
        held_out_examples=10,
    )
    answer = site.call(routes.CALIBRATE, calibration)
    assert answer.status_code == 204, answer.text


def delta_tensors(spec: ModelSpec, manifest: SliceManifest) -> dict[str, FloatArray]:
    """Make the tensors of an honest delta."""
    shapes = spec.delta_shapes(manifest.adapter, manifest.trained_layer_ids)
    generator = np.random.default_rng(7)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def honest_delta(spec: ModelSpec, manifest: SliceManifest) -> Delta:
    """Make a delta that must be admitted."""
    return Delta.of(serialize_tensors(delta_tensors(spec, manifest)), manifest.assignment_id)


def register_model(store: Store, blobs: BlobStore) -> ModelSpec:
    """Register a tiny model whose blobs are there; only the head's holds tensors."""
    spec = make_model_spec(num_layers=4)
    generator = np.random.default_rng(3)
    head = {
        name: generator.normal(size=shape).astype(np.float32)
        for name, shape in spec.head_parameters.items()
    }
    bodies = [blobs.put_bytes(b"the weights of a piece")] * (1 + spec.num_layers)
    stem, *layers, head_piece = (
        piece.model_copy(update={"weights": blob})
        for piece, blob in zip(
            (spec.stem, *spec.layers, spec.head),
            (*bodies, blobs.put_bytes(serialize_tensors(head))),
            strict=True,
        )
    )
    pieces = {"stem": stem, "layers": tuple(layers), "head": head_piece}
    spec = spec.model_copy(update=pieces)
    store.add_model(spec, SystemClock().now())
    return spec


def create_run(
    store: Store, blobs: BlobStore, spec: ModelSpec, name: str, **options: object
) -> RunRecord:
    """Create a run and set it going."""
    run_spec = make_run_spec(**options)
    now = SystemClock().now()
    record = RunRecord(RunId(name), spec.model_id, run_spec, RunState.RUNNING, now)
    store.add_run(record, initial_revision(spec, record.run, run_spec, blobs, now))
    return record


@contextmanager
def headquarters(
    home: ServerHome, config: ServerConfig, free_bytes: Callable[[Path], int] = free_disk_bytes
) -> Iterator[Headquarters]:
    """Serve a home with everything real, on a thread, with one model registered.

    Sites may enrol without a join string unless the settings say otherwise.
    """
    if "enrolment" not in config.model_fields_set:
        config = config.model_copy(update={"enrolment": "open"})
    home.create()
    with ExitStack() as stack:
        listener = stack.enter_context(listen("127.0.0.1", 0))
        store = Store.open(home.path)
        stack.callback(store.close)
        services = replace(build_services(home, config, store), free_bytes=free_bytes)
        spec = register_model(services.store, services.blobs)
        services.coordinator.start()
        stack.callback(services.coordinator.stop)
        ready = threading.Event()
        tls = ServerTls(home, config) if is_secured(config) else None
        server = GracefulServer(services, ready.set, tls)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        stack.callback(thread.join)
        stack.callback(setattr, server, "should_exit", True)
        assert ready.wait(_TIMEOUT_S)
        url = url_of("127.0.0.1", port_of(listener), is_secure=is_secured(config))
        yield Headquarters(url, services, spec)


def home_in(directory: Path) -> ServerHome:
    """Name a server's home below a test's directory."""
    return ServerHome(directory / "server")
