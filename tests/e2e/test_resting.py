"""A client that has nothing to do gives its memory back, and works again when there is work."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.edges import EdgeSite, wait_until
from tests.support.federation import Federation, running_federation
from tests.support.sites import write_folder

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(os.name != "posix", reason="only there can a process change its program"),
]

SMALL_BYTES = 60 * 2**20  # far below a process with a training runtime; the bench has the figure
TRAINING = {"batch_size": 6, "max_steps": 2, "min_participants": 1}


@pytest.fixture
def federation(prepared_home: Path, tmp_path: Path) -> Iterator[Federation]:
    with running_federation(tmp_path / "server", prepared_home) as federation:
        yield federation


@pytest.fixture
def site(federation: Federation, tmp_path: Path) -> EdgeSite:
    data = write_folder(tmp_path / "data", seed=1)
    site = federation.add_site("press", data.path, tmp_path, "--", rest_after_s="0.5", poll_s="1")
    federation.have_running([site])
    return site


def resident_bytes(site: EdgeSite) -> int:
    return int(psutil.Process(site.client.pid).memory_info().rss)


def wait_for_rest(site: EdgeSite) -> None:
    process = psutil.Process(site.client.pid)
    wait_until("a rest", lambda: "fedra_edge.resting" in process.cmdline())
    wait_until("little memory", lambda: resident_bytes(site) < SMALL_BYTES)


def is_known_as_online(federation: Federation) -> bool:
    (told,) = federation.operate("client", "list")["clients"]
    return bool(told["state"] == "online")


def test_a_client_rests_works_and_rests_again(federation: Federation, site: EdgeSite) -> None:
    pid = site.client.pid
    for run in ("first", "second"):
        wait_for_rest(site)
        federation.start_run(run, rounds=1, **TRAINING)
        federation.wait_for_rounds(run, 1)
    site.client.wait_for("its contributions", lambda event: event["rounds_contributed"] == 2)
    wait_for_rest(site)
    assert site.client.pid == pid
    assert site.complaints() == ""


def test_a_resting_client_that_is_stopped_says_goodbye(
    federation: Federation, site: EdgeSite
) -> None:
    wait_for_rest(site)
    assert site.client.ask_to_stop() == 0
    assert not is_known_as_online(federation)
    assert site.complaints() == ""


def test_a_resting_client_can_be_stopped_when_the_server_is_gone(
    federation: Federation, site: EdgeSite
) -> None:
    wait_for_rest(site)
    federation.server.kill()
    assert site.client.ask_to_stop() == 0
    assert site.complaints() == ""


def test_the_home_of_a_resting_client_is_taken(site: EdgeSite) -> None:
    wait_for_rest(site)
    second = EdgeSite(
        site.name, site.url, site.home, site.data, site.log.with_name("second.log")
    ).join()
    assert second.wait_for_end() == 3
    assert any("another client is running" in str(event) for event in second.events)


def test_a_client_that_was_removed_while_it_rested_is_told(
    federation: Federation, site: EdgeSite
) -> None:
    wait_for_rest(site)
    federation.store.leave(site.identity.client_id, now=time.time())
    assert site.client.wait_for_end() != 0
    assert site.client.events[-1]["event"] == "error"
    assert "leave" in site.client.events[-1]["remedy"]
