"""A server without space: new deltas are refused politely, the held ones finished, all recovers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from fedra_edge.protocol import routes
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.slices import SliceManifest
from fedra_server.config import ServerHome
from fedra_server.runs import RunState
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.disks import fill, small_disk
from tests.support.edges import wait_until
from tests.support.headquarters import (
    Site,
    calibrate,
    connection,
    create_run,
    enrol,
    honest_delta,
)
from tests.support.servers import ServerProcess, run_server_command, running_server
from tests.support.wide_adapters import register_wide_model, wide_adapter

pytestmark = pytest.mark.e2e

RUN = "run"
BALLAST_BYTES = 50 * 10**6
LIMIT_BYTES = 55 * 10**6
"""Room for the first revision, 2 MB, and for one delta beside it."""
DISK_BYTES = 64 * 2**20
LEFT_BYTES = 600_000
"""Enough for records, too little for a merge."""


@contextmanager
def prepared(home: Path, **options: object) -> Iterator[tuple[Store, ModelSpec]]:
    """Have a home with a model whose adapters are 2 MB, and a run of one round."""
    run_server_command("init", "--home", str(home))
    store, blobs = Store.open(home), BlobStore(ServerHome(home).blobs)
    try:
        spec = register_wide_model(store, blobs)
        create_run(store, blobs, spec, RUN, rounds=1, adapter=wide_adapter(), **options)
        yield store, spec
    finally:
        store.close()


@contextmanager
def two_participants(url: str, spec: ModelSpec) -> Iterator[list[tuple[Site, SliceManifest]]]:
    """Have two clients with work in the first round."""
    with ExitStack() as stack:
        sites = [enrol(stack.enter_context(connection(url)), f"plant-{i}", RUN) for i in (0, 1)]
        for site in sites:
            calibrate(site, spec)
        yield [(site, site.work(wait_s=20)) for site in sites]


def announce(site: Site, spec: ModelSpec, work: SliceManifest) -> httpx.Response:
    return site.call(routes.UPLOAD_CREATE, honest_delta(spec, work).manifest)


def test_the_limit_refuses_what_is_new_and_finishes_what_is_held(tmp_path: Path) -> None:
    home = tmp_path / "server"
    with prepared(home) as (store, spec), ExitStack() as stack:
        ballast = ServerHome(home).deltas / "ballast"
        with ballast.open("wb") as file:
            file.truncate(BALLAST_BYTES)
        settings = {"max_disk_bytes": str(LIMIT_BYTES)}
        server = stack.enter_context(running_server(home, settings=settings))
        both = stack.enter_context(two_participants(server.url, spec))
        (first, held), (second, refused) = both
        delta = honest_delta(spec, held)
        upload = first.announce(delta)
        first.append(upload.upload_id, delta.data[:1000], complete=False)
        answer = announce(second, spec, refused)
        assert (answer.status_code, answer.json()["code"]) == (507, "storage-full")
        assert f"max_disk_bytes allows {LIMIT_BYTES}" in answer.json()["detail"]
        assert "fedra-server prune" in answer.json()["remedy"]
        answer = first.append(upload.upload_id, delta.data[1000:], offset=1000)
        assert answer.json()["status"] == "admitted"
        told = run_server_command("disk", "--home", str(home), settings=settings).stdout
        assert "of 55.0 MB allowed" in told
        ballast.unlink()
        wait_until("space", lambda: announce(second, spec, refused).status_code == 201)
        assert second.send(honest_delta(spec, refused)).json()["status"] == "admitted"
        wait_until("the end of the run", lambda: is_finished(store))


def test_readiness_tells_a_shortage(tmp_path: Path) -> None:
    with running_server(tmp_path / "server", settings={"max_disk_bytes": "1"}) as server:
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        (server.home / "deltas" / "first").write_bytes(b"12")
    with running_server(tmp_path / "server", settings={"max_disk_bytes": "1"}) as server:
        answer = httpx.get(f"{server.url}/health/ready")
        assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
        assert "max_disk_bytes allows 1, of which 2 are taken" in answer.json()["detail"]


def test_a_merge_without_space_is_told_once_and_made_when_space_returns(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk, ExitStack() as stack:
        home = disk / "server"
        store, spec = stack.enter_context(prepared(home))
        server = stack.enter_context(running_server(home))
        both = stack.enter_context(two_participants(server.url, spec))
        (first, first_work), (second, second_work) = both
        assert first.send(honest_delta(spec, first_work)).json()["status"] == "admitted"
        delta = honest_delta(spec, second_work)
        upload = second.announce(delta)
        filler = fill(disk)
        with filler.open("rb+") as file:
            file.truncate(filler.stat().st_size - len(delta.data) - LEFT_BYTES)
        assert announce(second, spec, second_work).status_code == 507
        answer = second.append(upload.upload_id, delta.data)
        assert answer.json()["status"] == "admitted"  # what was accepted is finished
        complaint = f"run {RUN} cannot go on: "
        wait_until("a complaint", lambda: complaint in log_of(server))
        threading.Event().wait(3.0)  # it is tried again every second
        assert log_of(server).count(complaint) == 1
        assert store.revision(RUN).manifest.number == 0
        filler.unlink()
        wait_until("the end of the run", lambda: is_finished(store))
        assert f"run {RUN} goes on" in log_of(server)
        assert run_server_command("audit", "--home", str(home)).returncode == 0


def log_of(server: ServerProcess) -> str:
    return server.log.read_text("utf-8")


def is_finished(store: Store) -> bool:
    return store.run(RUN).state is RunState.FINISHED
