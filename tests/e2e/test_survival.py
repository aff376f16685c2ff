"""Clients and servers are killed, stall or run out of space: rounds finish, nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest

from fedra_edge.protocol import routes
from fedra_server.runs import AssignmentState
from tests.support.disks import fill, small_disk
from tests.support.edges import EdgeSite, wait_until
from tests.support.federation import Federation, running_federation
from tests.support.headquarters import PROTOCOL
from tests.support.sites import write_folder

pytestmark = pytest.mark.e2e

BOTH = {"north", "south"}
LONG = {"batch_size": 6, "local_epochs": 1000, "max_steps": 150, "merge_weighting": "uniform"}
"""A second or more of training, so that there is a middle to be interrupted in."""
SERVER_DISK_BYTES = 64 * 2**20
SITE_DISK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Pair:
    """A server and two sites; None instead of a disk where small disks cannot be made."""

    federation: Federation
    server_disk: Path | None
    site_disk: Path | None

    @property
    def north(self) -> EdgeSite:
        return self.federation.sites["north"]

    @property
    def south(self) -> EdgeSite:
        return self.federation.sites["south"]

    @contextmanager
    def amid_training(self, run: str) -> Iterator[None]:
        """Do the block while both are in the middle of training, however slow the machine."""
        sites = [self.north, self.south]
        for site in sites:
            site.client.wait_for_phase("training", run)
            site.client.freeze()
        given = self.federation.assignments(run)
        assert {record.state for record in given.values()} == {AssignmentState.PENDING}
        assert [site.deltas_waiting for site in sites] == [0, 0]
        yield
        for site in sites:
            site.client.thaw()

    def check_that_both_count_once(self, run: str) -> None:
        """Both deltas made it into the only round, and the revision holds each exactly once."""
        report = self.federation.wait_for_rounds(run, 1)
        assert report.rounds[0].merged == len(BOTH)
        records = self.federation.store.assignments(run)
        assert [record.state for record in records] == [AssignmentState.MERGED] * len(BOTH)
        assert set(self.federation.assignments(run)) == BOTH
        self.federation.check_merge(run, 1)
        delivered = {record.assignment_id for record in records}
        for site in (self.north, self.south):
            wait_until(f"an empty outbox at {site.name}", partial(has_empty_outbox, site))
            assert delivered.isdisjoint(site.deltas_refused)


def has_empty_outbox(site: EdgeSite) -> bool:
    return site.deltas_waiting == 0


def has_contributed(federation: Federation, run: str, name: str) -> bool:
    clients = federation.report(run).clients
    return any(client.name == name and client.rounds_merged > 0 for client in clients)


def announce_again(site: EdgeSite) -> httpx.Response:
    """Make the call that the site's client makes with the delta in its outbox."""
    [manifest] = site.config.outbox.glob("*.json")
    headers = {**PROTOCOL, "Content-Type": "application/json"}
    with httpx.Client(base_url=site.url, headers=headers) as http:
        http.headers["Authorization"] = f"Bearer {site.session(http)}"
        return http.post(routes.UPLOAD_CREATE.path, content=manifest.read_bytes())


def disk_or_directory(stack: ExitStack, place: Path, size_bytes: int) -> tuple[Path, bool]:
    """Make a small disk, or a directory where the machine does not permit that."""
    try:
        return stack.enter_context(small_disk(place, size_bytes)), True
    except pytest.skip.Exception:
        place.mkdir(exist_ok=True)
        return place, False


@pytest.fixture(scope="module")
def lasting_pair(prepared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    place = tmp_path_factory.mktemp("pair")
    with ExitStack() as stack:
        home, is_small = disk_or_directory(stack, place / "server", SERVER_DISK_BYTES)
        site_home, is_site_small = disk_or_directory(stack, place / "north", SITE_DISK_BYTES)
        federation = stack.enter_context(running_federation(home, prepared_home))
        for seed, name in enumerate(sorted(BOTH)):
            data = write_folder(place / "data" / name, seed).path
            home_here = site_home if name == "north" else None
            # no heartbeat: a straggler hears of its round only when it delivers
            federation.add_site(name, data, place, home=home_here, heartbeat_s="600")
        yield Pair(federation, home if is_small else None, site_home if is_site_small else None)


@pytest.fixture
def pair(lasting_pair: Pair) -> Iterator[Pair]:
    """Both clients run and have measured the model; no run is left behind."""
    federation = lasting_pair.federation
    sites = [lasting_pair.north, lasting_pair.south]
    is_first = not lasting_pair.north.processes
    federation.have_server()
    federation.have_running(sites)
    if is_first:
        federation.start_run("warm-up", rounds=1, min_participants=2, max_steps=1)
        federation.wait_for_rounds("warm-up", 1)
    yield lasting_pair
    for site in sites:
        site.client.thaw()
    federation.end_runs()


def test_a_client_killed_in_training_comes_back_to_the_same_work(pair: Pair) -> None:
    run = "killed-client"
    pair.federation.start_run(run, rounds=1, min_participants=2, **LONG)
    with pair.amid_training(run):
        pair.north.client.kill()
    given = pair.federation.assignments(run)["north"]
    client_id = pair.north.identity.client_id

    pair.north.join()
    pair.check_that_both_count_once(run)
    merged = pair.federation.assignments(run)["north"]
    assert merged.assignment_id == given.assignment_id
    assert merged.client_id == client_id == pair.north.identity.client_id
    assert pair.federation.store.rounds(run)[0].draws == 1


def test_a_server_killed_while_clients_train_finishes_the_same_round(pair: Pair) -> None:
    run = "killed-server"
    pair.federation.start_run(run, rounds=1, min_participants=2, **LONG)
    clients = [pair.north.client, pair.south.client]
    with pair.amid_training(run):
        pair.federation.kill_server()
    given = pair.federation.assignments(run)

    pair.federation.start_server_again()
    pair.check_that_both_count_once(run)
    merged = pair.federation.assignments(run)
    assert {name: record.assignment_id for name, record in merged.items()} == {
        name: record.assignment_id for name, record in given.items()
    }
    assert [pair.north.client, pair.south.client] == clients


def test_a_delta_that_could_not_be_sent_outlives_its_client(pair: Pair) -> None:
    run = "killed-both"
    pair.federation.start_run(run, rounds=1, min_participants=2, **LONG)
    with pair.amid_training(run):
        pair.federation.kill_server()
    pair.north.client.wait_for_phase("sending", run)
    pair.north.client.kill()
    assert pair.north.deltas_waiting == 1
    assert pair.federation.assignments(run)["north"].state is AssignmentState.PENDING

    pair.federation.start_server_again()
    again = pair.north.join()
    pair.check_that_both_count_once(run)
    again.wait_for_phase("sending")
    assert all(event["phase"] != "training" for event in again.events)


def test_a_straggler_is_told_and_takes_part_in_the_next_round(pair: Pair) -> None:
    run = "straggler"
    late = pair.south
    pair.federation.start_run(run, rounds=1000, min_participants=1, deadline_s=6, **LONG)
    late.client.wait_for_phase("training", run)
    late.client.freeze()
    missed = pair.federation.assignments(run)["south"]
    assert missed.state is AssignmentState.PENDING
    first = pair.federation.wait_for_rounds(run, 1).rounds[0]
    assert (first.participants, first.merged) == (2, 1)
    late.client.thaw()
    wait_until("a refused delta", lambda: missed.assignment_id in late.deltas_refused)
    assert "ended without this delta" in late.complaints()
    assert late.deltas_waiting == 0
    wait_until(
        "a later delta of the straggler",
        lambda: has_contributed(pair.federation, run, "south"),
    )
    expired = pair.federation.assignments(run)["south"]
    assert expired.state is AssignmentState.EXPIRED
    assert late.is_running


def test_a_full_server_disk_keeps_the_delta_at_the_site(pair: Pair) -> None:
    if pair.server_disk is None:
        pytest.skip("mounting is not permitted here")
    run = "full-server"
    pair.federation.start_run(run, rounds=1, min_participants=2, **LONG)
    with pair.amid_training(run):
        filler = fill(pair.server_disk)
    try:
        for site in (pair.north, pair.south):
            site.client.wait_for(
                "a word about the full disk",
                lambda event: event["run"] == run and "no space" in event["detail"],
            )
            assert site.deltas_waiting == 1
        answer = announce_again(pair.north)
        assert (answer.status_code, answer.json()["code"]) == (507, "storage-full")
    finally:
        filler.unlink()
    pair.check_that_both_count_once(run)


def test_a_full_disk_at_a_site_costs_no_finished_training(pair: Pair) -> None:
    if pair.site_disk is None:
        pytest.skip("mounting is not permitted here")
    run = "full-site"
    pair.federation.start_run(run, rounds=1000, min_participants=1, deadline_s=60, **LONG)
    with pair.amid_training(run):
        filler = fill(pair.site_disk)
        given = pair.federation.assignments(run)["north"].assignment_id
    try:
        wait_until(
            "the delta, for which cached weights gave way",
            lambda: pair.federation.store.assignment(given).state is AssignmentState.MERGED,
        )
    finally:
        filler.unlink()
    assert has_contributed(pair.federation, run, "north")
    assert pair.north.is_running
