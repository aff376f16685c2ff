"""A served home: announced when ready, alone, stopped cleanly, and back after being killed."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from fedra_edge.protocol import routes
from fedra_edge.protocol.models import ModelSpec
from fedra_server.config import ServerConfig, ServerHome
from fedra_server.http import connections
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.headquarters import (
    calibrate,
    connection,
    create_run,
    enrol,
    headquarters,
    home_in,
    honest_delta,
    register_model,
    sign_in,
)
from tests.support.keys import SiteKey, enrol_key
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
        key = SiteKey()
        site = sign_in(http, key, enrol_key(http, key, "plant", "run"))
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
            site = sign_in(http, key, site.client_id)
            assert site.announce(delta).offset_bytes == 700
            answer = site.append(upload.upload_id, delta.data[700:], offset=700)
            assert answer.json()["status"] == "admitted"
            assert site.work(wait_s=20).revision.number == 1
        finally:
            assert again.stop() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="sockets are no files there")
def test_idle_connections_neither_stop_it_nor_fill_the_disk(home: Path) -> None:
    with running_server(home, max_open_files=256) as server, ExitStack() as crowd:
        place = httpx.URL(server.url)
        for _ in range(400):
            idle = socket.create_connection((place.host, place.port or 0), timeout=10)
            crowd.enter_context(idle)
        answer = httpx.get(f"{server.url}/health/live", timeout=10)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
        crowd.close()
        assert live_again(server.url)
        assert server.stop() == 0
        log = server.log.read_text("utf-8")
    assert "raise it to" in log
    assert len(log) < 5000


def test_a_connection_that_asks_for_nothing_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_HEAD_S", 0.5)
    with headquarters(home_in(tmp_path), ServerConfig()) as running, ExitStack() as stack:
        place = httpx.URL(running.url)
        for sent in (b"", b"GET /health/live HTTP/1.1\r\nHost: x"):
            idle = socket.create_connection((place.host, place.port or 0), timeout=10)
            stack.enter_context(idle)
            idle.sendall(sent)
            assert idle.recv(100) == b""
        with connection(running.url) as http:  # nothing is due between two requests
            assert http.get("/health/live").status_code == 200
            stream = http.get("/health/live").extensions["network_stream"]
            threading.Event().wait(0.8)
            assert http.get("/health/live").extensions["network_stream"] is stream


def live_again(url: str) -> bool:
    """Wait until a server answers that it lives."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health/live").status_code == 200:
                return True
        threading.Event().wait(0.05)
    return False
