"""What cannot work is said: wrong keys, bad data, no server, no room; with its exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedra_server.runs import AssignmentState
from tests.support.edges import EdgeSite, wait_until
from tests.support.federation import Federation, running_federation
from tests.support.gate import make_member
from tests.support.headquarters import connection, enrol
from tests.support.keys import authority_of
from tests.support.sites import write_folder

pytestmark = pytest.mark.e2e

NOBODY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def federation(
    prepared_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    home = tmp_path_factory.mktemp("headquarters") / "server"
    with running_federation(home, prepared_home) as running:
        yield running


@pytest.fixture
def site(federation: Federation, tmp_path: Path) -> Iterator[EdgeSite]:
    """A machine with good data that has not joined; nothing of it goes on after the test."""
    machine = federation.add_site("site", write_folder(tmp_path / "data", seed=5).path, tmp_path)
    yield machine
    if machine.is_running:
        machine.client.kill()
    federation.end_runs()


def told(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """Give the error that a command with --json ended with."""
    event: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert event["event"] == "error"
    return event


def test_a_key_of_somebody_else_is_refused(federation: Federation, site: EdgeSite) -> None:
    with connection(federation.url) as http:
        client_id = enrol(http, "site").client_id
        ca_sha256 = authority_of(http).ca_sha256
    make_member(site.config, client_id, ca_sha256)

    asked = site.command("status")
    assert asked.returncode == 6
    assert asked.stderr.startswith("error: ")
    assert "fedra-edge leave" in asked.stderr

    client = site.join()
    assert client.wait_for_end() == 6
    last = client.events[-1]
    assert (last["event"], last["code"]) == ("error", 6)
    assert f"token create --client {client_id}" in last["remedy"]
    assert site.identity.client_id == client_id


def test_bad_files_are_left_out_and_the_rest_is_trained_on(
    federation: Federation, site: EdgeSite
) -> None:
    train = site.data / "train"
    (train / "bolt" / "broken.png").write_bytes(b"no image at all")
    (train / "bolt" / "cut.png").write_bytes((train / "bolt" / "000.png").read_bytes()[:200])
    (train / "bolt" / "notes.txt").write_text("not an image", encoding="utf-8")
    shutil.copytree(train / "nut", train / "spanner")
    (train / "hinge").mkdir()
    shutil.rmtree(train / "washer")
    federation.start_run("untidy", rounds=1, min_participants=1)

    client = site.join("--run", "untidy")
    assert client.wait_for_end() == 0
    assert client.events[-1]["phase"] == "stopped"
    [done] = federation.store.assignments("untidy")
    assert done.state is AssignmentState.MERGED
    assert done.delta is not None
    assert done.delta.num_examples == sum(
        len(list((train / label).glob("0*.png"))) for label in ("bolt", "nut")
    )
    said = site.complaints()
    for expected in (
        "label 'spanner' is unknown to the model: 12 (train/spanner/000.png",
        "class directory without images: 1 (train/hinge)",
        "not an image file: 1 (train/bolt/notes.txt)",
        "the model's label has no example to train on here: 1 (washer)",
        "train/bolt/broken.png",
        "train/bolt/cut.png",
    ):
        assert expected in said
    assert "Traceback" not in said


def test_data_of_which_nothing_can_be_used_ends_the_client(
    federation: Federation, site: EdgeSite
) -> None:
    shutil.rmtree(site.data)
    (site.data / "bolt").mkdir(parents=True)
    (site.data / "bolt" / "broken.png").write_bytes(b"no image at all")
    shutil.copytree(write_folder(site.home.with_name("other"), seed=6).path, site.data / "spanner")
    federation.start_run("for-nobody", rounds=1, min_participants=1)

    client = site.join()
    assert client.wait_for_end() == 4
    last = client.events[-1]
    assert (last["event"], last["code"]) == ("error", 4)
    assert "can be trained on" in last["message"]
    assert "spanner" in last["message"]
    assert "bolt, nut, washer" in last["remedy"]
    assert federation.report("for-nobody").round is None


def test_data_that_is_not_there_ends_the_client(federation: Federation, site: EdgeSite) -> None:
    shutil.rmtree(site.data)
    done = site.command("join", "--json", "--server", federation.url, "--data", str(site.data))
    assert done.returncode == 4
    assert str(site.data) in str(told(done)["message"])


def test_a_client_without_a_server_keeps_trying_until_told_to_stop(site: EdgeSite) -> None:
    client = replace(site, url=NOBODY).join()
    first = client.wait_for("a word", lambda event: "trying again" in event["detail"])
    assert "cannot be reached" in first["detail"]
    assert "--server" in first["detail"]
    client.wait_for(
        "another attempt", lambda event: "trying again" in event["detail"] and event is not first
    )
    assert client.ask_to_stop() == 0
    assert client.events[-1]["phase"] == "stopped"
    assert "Traceback" not in site.complaints()


def test_a_single_command_without_a_server_fails(site: EdgeSite) -> None:
    lonely = replace(site, url=NOBODY)
    make_member(lonely.config, "somebody")
    for command in ("status", "leave"):
        done = lonely.command(command, "--json")
        assert done.returncode == 5
        assert "cannot be reached" in str(told(done)["message"])
        assert told(done)["remedy"]
    assert lonely.identity.client_id == "somebody"
    assert lonely.command("leave", "--forget").returncode == 0
    assert lonely.identity_file.load() is None


def test_a_quota_that_is_too_small_is_told_on_both_sides(
    federation: Federation, site: EdgeSite
) -> None:
    federation.start_run("roomy", rounds=1, min_participants=1)
    cramped = replace(site, settings={"disk_quota_bytes": "1000"})
    client = cramped.join("--run", "roomy")
    wait_until(
        "the reason at the client",
        lambda: any("of disk" in str(event.get("detail")) for event in client.events),
    )
    assert federation.store.assignments("roomy") == []
    assert client.ask_to_stop() == 0
