"""Sites join over TLS with a join string, change their key, are revoked, come back, and leave."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedra_edge.outbox import Outbox
from fedra_edge.protocol.fault_points import FAULT_VARIABLE
from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.trust import JoinString
from tests.support.builders import make_training_report
from tests.support.edges import EdgeSite, run_edge_command, wait_until
from tests.support.federation import Federation, running_federation
from tests.support.sites import write_folder
from tests.support.web_proxy import WebProxy, web_proxy

pytestmark = pytest.mark.e2e

STRICT = {"FEDRA_SERVER_TLS": "on", "FEDRA_SERVER_ENROLMENT": "token"}
QUICK = {"rounds": 1, "min_participants": 1, "batch_size": 6, "max_steps": 2}
LONG = {**QUICK, "local_epochs": 1000, "max_steps": 100_000}
PROXY_PASSWORD = "planted-in-the-proxy"  # noqa: S105 (made up, to be looked for)
REVOKED, REFUSED = 9, 6


@pytest.fixture(scope="module")
def federation(
    prepared_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    home = tmp_path_factory.mktemp("headquarters") / "server"
    with running_federation(home, prepared_home, STRICT) as running:
        yield running


@pytest.fixture
def proxy() -> Iterator[WebProxy]:
    with web_proxy(account=f"plant:{PROXY_PASSWORD}") as running:
        yield running


def join_string(federation: Federation, *options: str) -> str:
    return str(federation.operate("token", "create", *options)["join_string"])


def secret_of(joining: str) -> str:
    return JoinString.parse(joining).secret


@pytest.fixture
def site(federation: Federation, tmp_path: Path) -> Iterator[EdgeSite]:
    """A machine that was given a join string, and has not used it; nothing of it goes on."""
    data = write_folder(tmp_path / "data", seed=4)
    name = re.sub(r"\W", "-", tmp_path.name)[-40:].strip("-")
    machine = federation.add_site(
        name, data.path, tmp_path, "--backend", "onnx", heartbeat_s="0.2", poll_s="1"
    )
    machine.url = join_string(federation)
    yield machine
    if machine.is_running:
        machine.client.kill()
    federation.end_runs()
    del federation.sites[name]


def joined(site: EdgeSite, *options: str) -> EdgeSite:
    site.join(*options).wait_for_phase("waiting")
    return site


def files_with(directory: Path, secret: bytes) -> list[str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [path.name for path in files if secret in path.read_bytes()]


def test_a_join_string_is_all_that_a_site_types_also_behind_a_proxy(
    federation: Federation, site: EdgeSite, proxy: WebProxy
) -> None:
    joined(site, "--proxy", proxy.url)
    federation.start_run(f"tunnelled-{site.name}", **QUICK)
    federation.wait_for_rounds(f"tunnelled-{site.name}", 1)
    site.client.wait_for("its contribution", lambda event: event["rounds_contributed"] == 1)
    assert {line.split(" ")[0] for line in proxy.seen} == {"CONNECT"}
    assert site.client.ask_to_stop() == 0

    site.url = federation.url  # from now on the address is enough
    assert joined(site).client.ask_to_stop() == 0
    told = json.loads(site.command("status", "--json").stdout)  # and here nothing at all
    assert (told["server"], told["name"]) == (federation.url, site.name)


@pytest.mark.skipif(os.name != "posix", reason="only there can a process change its program")
def test_no_secret_is_on_the_command_lines_of_a_client_that_rests(
    federation: Federation, site: EdgeSite, proxy: WebProxy
) -> None:
    secrets = (secret_of(site.url), PROXY_PASSWORD)
    site.settings = {**site.settings, "rest_after_s": "0.5", "proxy": proxy.url}
    joined(site)
    process = psutil.Process(site.client.pid)
    for run in (f"first-{site.name}", f"second-{site.name}"):
        wait_until("a rest", lambda: "fedra_edge.resting" in process.cmdline())
        assert not [secret for secret in secrets if secret in " ".join(process.cmdline())]
        if run.startswith("second"):
            federation.kill_server()
            federation.start_server_again()  # the session that it rests with is dead
        federation.start_run(run, **QUICK)
        federation.wait_for_rounds(run, 1)
    assert site.client.ask_to_stop() == 0


def test_no_secret_is_in_any_output_or_file_but_the_key_s(
    federation: Federation, site: EdgeSite, proxy: WebProxy
) -> None:
    site.settings = {**site.settings, "proxy": proxy.url}
    joined(site, "--verbose")
    federation.kill_server()
    federation.start_server_again()
    federation.start_run(f"told-{site.name}", **QUICK)
    federation.wait_for_rounds(f"told-{site.name}", 1)
    assert site.client.ask_to_stop() == 0

    outputs = [json.dumps(site.client.events), site.complaints()]
    for command in (["status"], ["rotate-key"], ["status", "--json"], ["rotate-key", "--json"]):
        done = site.command(*command, "--server", site.url)
        assert done.returncode == 0, done.stderr
        outputs += [done.stdout, done.stderr]
    wrong = re.sub(r"[0-9a-f]{64}$", "ab" * 32, site.url)
    for server in (wrong, site.url[:-1], f"{site.url}#", site.url.replace("https", "ftp")):
        done = site.command("status", "--server", server)
        assert done.returncode != 0
        outputs += [done.stdout, done.stderr]
    key_file = site.config.membership / "key.pem"
    key = key_file.read_text(encoding="ascii").splitlines()[1]
    for planted in (secret_of(site.url), PROXY_PASSWORD, key):
        assert not [text for text in outputs if planted in text], planted
    assert files_with(site.home, secret_of(site.url).encode()) == []
    assert files_with(site.home, key.encode()) == ["key.pem"]
    assert os.name != "posix" or stat.S_IMODE(key_file.stat().st_mode) == 0o600


def test_a_join_string_for_one_admits_one(federation: Federation, site: EdgeSite) -> None:
    joined(site).client.ask_to_stop()
    assert joined(site).client.ask_to_stop() == 0  # the same string again just rejoins
    second = federation.add_site("second", site.data, site.home.parent)
    second.url = site.url
    client = second.join()
    assert client.wait_for_end() == REFUSED
    assert "used up" in client.events[-1]["message"]
    assert "token create" in client.events[-1]["remedy"]
    del federation.sites["second"]


def test_who_is_revoked_while_it_trains_ends_at_once_and_keeps_its_deltas(
    federation: Federation, site: EdgeSite
) -> None:
    joined(site)
    run = f"revoked-{site.name}"
    federation.start_run(run, **LONG)
    site.client.wait_for("a step", lambda event: event["run"] == run and event["steps_done"])
    outbox = Outbox(site.config.outbox)
    outbox.put(AssignmentId("kept"), [b"no"], num_examples=1, report=make_training_report())
    federation.operate("client", "remove", site.name)
    assert site.client.wait_for_end() == REVOKED
    last = site.client.events[-1]
    assert (last["event"], last["code"]) == ("error", REVOKED)
    assert "ended the membership" in last["remedy"]
    assert outbox.num_waiting == 1
    assert site.join().wait_for_end() == REVOKED

    left = site.command("leave", "--json")
    assert left.returncode == 0, left.stderr
    assert json.loads(left.stdout)["told"] is False  # headquarters has done it before
    assert files_with(site.config.membership, b"PRIVATE KEY") == []
    assert outbox.num_waiting == 1
    site.url = join_string(federation)
    assert joined(site).client.ask_to_stop() == 0


def test_a_swapped_disk_brings_no_new_member(federation: Federation, site: EdgeSite) -> None:
    joined(site).client.ask_to_stop()
    before = site.identity.client_id
    old_home, site.home = site.home, site.home.with_name("new disk")
    site.url = join_string(federation, "--client", site.name)
    assert joined(site).client.ask_to_stop() == 0
    assert site.identity.client_id == before

    site.home = old_home  # somebody has found the old disk
    client = site.join()
    assert client.wait_for_end() == REFUSED
    assert f"--client {before}" in client.events[-1]["remedy"]


@pytest.mark.parametrize("fault_point", ["enrol.made", "enrol.received"])
def test_a_site_that_dies_while_it_enrols_becomes_one_member(
    federation: Federation, site: EdgeSite, fault_point: str
) -> None:
    before = len(federation.store.clients())
    site.variables = {FAULT_VARIABLE: fault_point}
    assert site.join().wait_for_end() == -signal.SIGKILL
    site.variables = {}
    assert joined(site).client.ask_to_stop() == 0
    assert len(federation.store.clients()) == before + 1


@pytest.mark.parametrize("fault_point", ["rotate.made", "rotate.told"])
def test_a_change_of_the_key_that_dies_locks_nobody_out(
    federation: Federation, site: EdgeSite, fault_point: str
) -> None:
    joined(site)
    told = run_edge_command(
        "rotate-key", "--home", str(site.home), settings=site.settings,
        variables={FAULT_VARIABLE: fault_point},
    )  # fmt: skip
    assert told.returncode == -signal.SIGKILL
    assert site.command("status").returncode == 0
    federation.kill_server()
    federation.start_server_again()  # the client that runs must sign in anew, with which key?
    federation.start_run(f"rotated-{site.name}", **QUICK)
    federation.wait_for_rounds(f"rotated-{site.name}", 1)
    assert site.command("rotate-key").returncode == 0
    assert site.client.ask_to_stop() == 0
    assert not (site.config.membership / "next-key.pem").exists()
    assert joined(site).client.ask_to_stop() == 0


def test_a_running_client_changes_its_key_by_itself(federation: Federation, site: EdgeSite) -> None:
    joined(site).client.ask_to_stop()
    key = site.config.membership / "key.pem"
    before = key.read_bytes()
    site.settings = {**site.settings, "rotate_key_after_days": "0.00001"}
    joined(site)
    wait_until("another key", lambda: key.read_bytes() != before)
    federation.start_run(f"changed-{site.name}", **QUICK)
    federation.wait_for_rounds(f"changed-{site.name}", 1)
    assert site.client.ask_to_stop() == 0
