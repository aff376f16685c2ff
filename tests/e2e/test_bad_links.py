"""Clients behind slow, far, breaking links that go dark for a while: their rounds complete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from fedra_server.runs import AssignmentState
from tests.support.edges import EdgeSite, Event, wait_until
from tests.support.federation import Federation, running_federation
from tests.support.link_proxy import LinkProxy, Quality, bad_link
from tests.support.sites import write_folder

pytestmark = pytest.mark.e2e

NAMES = ("north", "south")
BAD = Quality(bits_per_s=256_000, latency_s=0.1, reset_every=3, reset_below_bytes=40_000)
SHORT = {"batch_size": 6, "max_steps": 2, "merge_weighting": "uniform"}
SETTINGS = {"idle_timeout_s": "3", "poll_s": "2"}


@contextmanager
def linked_site(
    federation: Federation, name: str, place: Path, quality: Quality, **settings: str
) -> Iterator[tuple[EdgeSite, LinkProxy]]:
    """Set up a machine that reaches the server over a link of its own."""
    data = write_folder(place / "data" / name, seed=len(name) + ord(name[0])).path
    with bad_link(int(federation.url.rpartition(":")[2]), quality) as link:
        site = federation.add_site(name, data, place)
        site.url, site.settings = link.url, settings
        yield site, link


def is_settled(federation: Federation, run: str, state: AssignmentState) -> bool:
    records = federation.store.assignments(run)
    return len(records) == len(NAMES) and all(record.state is state for record in records)


def test_a_round_completes_over_bad_links(prepared_home: Path, tmp_path: Path) -> None:
    with (
        running_federation(tmp_path / "server", prepared_home) as federation,
        linked_site(federation, "north", tmp_path, BAD, **SETTINGS) as (north, north_link),
        linked_site(federation, "south", tmp_path, BAD, **SETTINGS) as (south, south_link),
    ):
        federation.have_running([north, south])
        federation.start_run("far", rounds=1, min_participants=2, **SHORT)
        for site, link, phase in (
            (north, north_link, "downloading"),
            (south, south_link, "sending"),
        ):
            site.client.wait_for_phase(phase, "far")
            link.darken()
            before = len(site.client.events)
            site.client.wait_for("a word about the darkness", _is_complaint, since=before)
        assert federation.report("far").rounds_published == 0
        north_link.lighten()
        south_link.lighten()

        federation.wait_for_rounds("far", 1)
        assert is_settled(federation, "far", AssignmentState.MERGED)
        federation.check_merge("far", 1)
        for site in (north, south):
            wait_until(f"an empty outbox at {site.name}", partial(_has_sent_all, site))
            assert site.deltas_refused == []
        assert north_link.carried.resets > 0
        assert south_link.carried.resets > 0


def test_a_client_under_a_cap_finds_its_weights_on_a_stick(
    prepared_home: Path, tmp_path: Path
) -> None:
    stick = prepared_home / "blobs"
    settings = {"max_bandwidth": "50KB", "mirrors": str(stick), "poll_s": "2"}
    with (
        running_federation(tmp_path / "server", prepared_home) as federation,
        linked_site(federation, "north", tmp_path, Quality(), **settings) as (north, link),
    ):
        federation.have_running([north])
        federation.start_run("stick", rounds=1, min_participants=1, **SHORT)
        federation.wait_for_rounds("stick", 1)
        federation.check_merge("stick", 1)
        weights_bytes = sum(path.stat().st_size for path in stick.rglob("??/*"))
        assert 0 < link.carried.bytes_down < weights_bytes


def _is_complaint(event: Event) -> bool:
    return "trying again" in event["detail"]


def _has_sent_all(site: EdgeSite) -> bool:
    return site.deltas_waiting == 0
