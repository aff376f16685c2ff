"""A served home: announced when ready, alone, stopped cleanly, and back after being killed."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from fedra_edge.protocol import routes
from fedra_edge.protocol.models import ModelSpec
from fedra_server.config import ServerHome
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.headquarters import (
    calibrate,
    connection,
    create_run,
    enrol,
    honest_delta,
    register_model,
)
from tests.support.servers import run_server_command, running_server, start_server

pytestmark = pytest.mark.e2e


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "server"


def prepare(home: Path) -> ModelSpec:
    """Register a model and start a run for one participant, as an operator would."""
    run_server_command("init", "--home", str(home))
    store, blobs = Store.open(home), BlobStore(ServerHome(home).blobs)
    spec = register_model(store, blobs)
    create_run(store, blobs, spec, "run", min_participants=1, rounds=2)
    store.close()
    return spec


def test_a_server_says_where_it_listens(home: Path) -> None:
    with running_server(home) as server:
        assert httpx.get(f"{server.url}/health/ready").json()["status"] == "ok"
        assert f"fedra-server listening on {server.url}\n" in server.log.read_text("utf-8")
        place = json.loads((home / "server.json").read_text("utf-8"))
        assert (place["url"], place["pid"]) == (server.url, server.process.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_and_answers_who_waits(home: Path, number: signal.Signals) -> None:
    answers: list[httpx.Response] = []
    with running_server(home) as server, connection(server.url) as http:
        site = enrol(http, "plant")
        poller = threading.Thread(
            target=lambda: answers.append(site.call(routes.ASSIGNMENT, params={"wait_s": "25"}))
        )
        poller.start()
        threading.Event().wait(0.5)
        started = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(20) == 0
        assert time.monotonic() - started < 5
        poller.join(20)
    assert [answer.json()["kind"] for answer in answers] == ["wait"]
    assert not (home / "server.json").exists()


def test_a_taken_port_is_told(home: Path, tmp_path: Path) -> None:
    with running_server(home) as server:
        port = server.url.rpartition(":")[2]
        other = tmp_path / "other"
        run_server_command("init", "--home", str(other))
        done = run_server_command("serve", "--home", str(other), "--port", port, check=False)
    assert done.returncode == 3
    assert f"port {port}" in done.stderr
    assert "--port" in done.stderr


def test_a_home_is_served_once(home: Path) -> None:
    with running_server(home):
        done = run_server_command("serve", "--home", str(home), "--port", "0", check=False)
        assert done.returncode == 3
        assert "another fedra-server" in done.stderr
        assert (home / "server.json").exists()


def test_an_upload_continues_after_the_server_was_killed(home: Path) -> None:
    spec = prepare(home)
    with running_server(home) as server, connection(server.url) as http:
        site = enrol(http, "plant", "run")
        calibrate(site, spec)
        work = site.work(wait_s=20)
        delta = honest_delta(spec, work)
        upload = site.announce(delta)
        answer = site.append(upload.upload_id, delta.data[:700], complete=False)
        assert answer.status_code == 204
        server.kill()
        port = int(server.url.rpartition(":")[2])
        again = start_server(home, port=port)
        try:
            assert site.announce(delta).offset_bytes == 700
            answer = site.append(upload.upload_id, delta.data[700:], offset=700)
            assert answer.json()["status"] == "admitted"
            assert site.work(wait_s=20).revision.number == 1
        finally:
            assert again.stop() == 0
