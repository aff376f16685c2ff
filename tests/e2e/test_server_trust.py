"""A server renews its certificate under running clients, and may die while it enrols them."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fedra_server.authority import AuthorityFiles
from tests.support.edges import EdgeSite, run_edge_command, wait_until
from tests.support.federation import NO_FRAMEWORK, Federation, running_federation
from tests.support.servers import serve_until_killed
from tests.support.sites import write_folder

pytestmark = pytest.mark.e2e

LIFE_S = 12
SHORT_LIVED = {
    "FEDRA_SERVER_TLS": "on",
    "FEDRA_SERVER_ENROLMENT": "token",
    "FEDRA_SERVER_CERTIFICATE_DAYS": str(LIFE_S / 86_400),
}
QUICK = {"rounds": 1, "min_participants": 1, "batch_size": 6, "max_steps": 2}


@pytest.fixture(scope="module")
def open_federation(
    prepared_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    home = tmp_path_factory.mktemp("open") / "server"
    with running_federation(home, prepared_home) as running:
        yield running


def machine(federation: Federation, directory: Path, name: str) -> EdgeSite:
    data = write_folder(directory / f"data of {name}", seed=4)
    return federation.add_site(
        name, data.path, directory, "--backend", "onnx", heartbeat_s="0.2", poll_s="1"
    )


def certificate_shown(federation: Federation) -> str:
    """Tell the number of the certificate that a newcomer is shown, who believes it."""
    authority = AuthorityFiles.of(federation.home).certificate
    context = ssl.create_default_context(cafile=authority)
    place = httpx.URL(federation.url)
    with (
        socket.create_connection((place.host, place.port or 0)) as plain,
        context.wrap_socket(plain, server_hostname=place.host) as secured,
    ):
        shown = secured.getpeercert()
        assert shown is not None
        return str(shown["serialNumber"])


def test_a_certificate_is_renewed_while_clients_work(prepared_home: Path, tmp_path: Path) -> None:
    with running_federation(tmp_path / "server", prepared_home, SHORT_LIVED) as federation:
        site = machine(federation, tmp_path, "plant")
        site.url = federation.operate("token", "create")["join_string"]
        site.join().wait_for_phase("waiting")
        numbers = [certificate_shown(federation)]
        for index in range(2):
            wait_until("another", lambda: certificate_shown(federation) not in numbers)
            numbers.append(certificate_shown(federation))
            federation.start_run(f"run-{index}", **QUICK)
            federation.wait_for_rounds(f"run-{index}", 1)
        assert len(set(numbers)) == 3
        assert "certificate" not in site.complaints()
        assert site.client.ask_to_stop() == 0
        assert site.join().wait_for_phase("waiting")
        assert "Traceback" not in federation.server.log.read_text(encoding="utf-8")


def test_a_server_that_dies_before_it_answers_has_enrolled_one_client(
    open_federation: Federation, tmp_path: Path
) -> None:
    federation = open_federation
    site = machine(federation, tmp_path, "joining")
    site.url = federation.operate("token", "create")["join_string"]
    port = int(federation.url.rpartition(":")[2])
    federation.kill_server()
    client = site.join()
    serve_until_killed(federation.home.path, "enrol.recorded", port=port, without=NO_FRAMEWORK)
    [enrolled] = federation.store.clients()
    federation.start_server_again()
    client.wait_for_phase("waiting")
    assert federation.store.clients()[0].client_id == site.identity.client_id == enrolled.client_id
    assert [it.uses_left for it in federation.store.tokens()] == [0]
    assert client.ask_to_stop() == 0


def test_a_server_that_dies_before_it_confirms_a_key_locks_nobody_out(
    open_federation: Federation, tmp_path: Path
) -> None:
    federation = open_federation
    site = machine(federation, tmp_path, "rotating")
    site.join().wait_for_phase("waiting")
    assert site.client.ask_to_stop() == 0
    port = int(federation.url.rpartition(":")[2])
    before = federation.store.client_and_key(site.identity.client_id)
    federation.kill_server()
    rotating = threading.Thread(
        target=run_edge_command,
        args=("rotate-key", "--home", str(site.home), "--server", site.url),
        kwargs={"settings": {"idle_timeout_s": "1"}},
    )
    dying = threading.Thread(
        target=serve_until_killed,
        args=(federation.home.path, "key.changed"),
        kwargs={"port": port, "without": NO_FRAMEWORK},
    )
    dying.start()
    wait_until("the server", lambda: is_listening(port))
    rotating.start()
    dying.join()
    federation.start_server_again()
    rotating.join()
    after = federation.store.client_and_key(site.identity.client_id)
    assert before is not None
    assert after is not None
    assert after[1] != before[1]
    assert site.command("status").returncode == 0
    site.join().wait_for_phase("waiting")
    assert site.client.ask_to_stop() == 0


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
