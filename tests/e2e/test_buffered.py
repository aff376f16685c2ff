"""A buffered run with real processes: slow sites hold nobody up, and what is late is told so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedra_server.runs import AssignmentState
from fedra_server.storage.records import AssignmentRecord
from tests.support.edges import EdgeSite, wait_until
from tests.support.federation import Federation, running_federation
from tests.support.merge_checks import check_revision
from tests.support.sites import write_folder

pytestmark = pytest.mark.e2e

NAMES = ("north", "east", "south")
LONG = {"batch_size": 6, "local_epochs": 1000, "max_steps": 100, "merge_weighting": "uniform"}
"""Half a second or more of training, so that there is a middle to be frozen in."""
BUFFERED = {"mode": "buffered", "buffer_size": 2, "min_participants": 3, "rounds": 1000, **LONG}


@pytest.fixture(scope="module")
def lasting_federation(
    prepared_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    place = tmp_path_factory.mktemp("buffered")
    with running_federation(place / "server", prepared_home) as federation:
        for seed, name in enumerate(NAMES):
            data = write_folder(place / "data" / name, seed).path
            # no heartbeat: a slow site hears that its work is stale only when it delivers
            federation.add_site(name, data, place, heartbeat_s="600")
        yield federation


@pytest.fixture
def federation(lasting_federation: Federation) -> Iterator[Federation]:
    """All sites run; no run is left behind."""
    lasting_federation.have_running(list(lasting_federation.sites.values()))
    yield lasting_federation
    for site in lasting_federation.sites.values():
        site.client.thaw()
    lasting_federation.end_runs()


def freeze_amid_training(federation: Federation, run: str) -> tuple[EdgeSite, AssignmentRecord]:
    """Stop one site while it works on its first slice."""
    slow = federation.sites["south"]
    slow.client.wait_for_phase("training", run)
    slow.client.freeze()
    given = federation.assignments(run)["south"]
    assert given.state is AssignmentState.PENDING
    assert slow.deltas_waiting == 0
    return slow, given


def check_all(federation: Federation, run: str) -> None:
    """Every revision is what its records say, and the auditor finds nothing to object to."""
    federation.end_runs()
    for number in range(1, federation.report(run).revision + 1):
        check_revision(federation.store, federation.blobs, federation.home, run, number)
    federation.operate("audit", run)


def test_others_go_on_without_a_slow_site_and_its_late_delta_counts(
    federation: Federation,
) -> None:
    run = "late"
    federation.start_run(run, **BUFFERED)
    slow, late = freeze_amid_training(federation, run)
    federation.wait_for_rounds(run, 3)
    assert federation.assignments(run)["south"].state is AssignmentState.PENDING
    slow.client.thaw()
    slow.client.wait_for(
        "a word about the late delta",
        lambda event: event["run"] == run and "admitted late" in event["detail"],
    )

    def merged() -> bool:
        return federation.assignments(run)["south"].state is AssignmentState.MERGED

    wait_until("the merge of the late delta", merged)
    federation.end_runs()
    report = federation.report(run)
    rows = [
        merge
        for number in range(1, report.revision + 1)
        for merge in federation.store.merges(run, number)
        if merge.assignment_id == late.assignment_id
    ]
    trained = len(late.manifest.trained_layer_ids)
    assert len(rows) == len({row.piece for row in rows}) == trained + 1
    assert min(row.staleness for row in rows) >= 3
    for row in rows:
        assert row.weight == (1 + row.staleness) ** -0.5
    assert max(it.max_staleness for it in report.rounds) >= 3
    check_all(federation, run)


def test_a_delta_that_is_too_stale_is_refused_and_its_client_says_why_and_goes_on(
    federation: Federation,
) -> None:
    run = "too-stale"
    federation.start_run(run, **{**BUFFERED, "max_staleness": 1})
    slow, late = freeze_amid_training(federation, run)
    federation.wait_for_rounds(run, 3)
    assert federation.assignments(run)["south"].state is AssignmentState.EXPIRED
    slow.client.thaw()
    wait_until("a refused delta", lambda: late.assignment_id in slow.deltas_refused)
    assert "since revision 0, and the run takes a staleness of at most 1" in slow.complaints()

    def has_contributed() -> bool:
        clients = federation.report(run).clients
        return any(it.name == "south" and it.rounds_merged > 0 for it in clients)

    wait_until("a later delta of the slow site", has_contributed)
    check_all(federation, run)


def shown_in_status(federation: Federation, run: str) -> list[Any]:
    return list(federation.operate("run", "status", run)["resting"])


def shown_in_list(federation: Federation, name: str) -> list[Any]:
    clients = federation.operate("client", "list")["clients"]
    return [rest for it in clients if it["name"] == name for rest in it["rests"]]


def wait_for_news(what: str, look: Callable[[], list[Any]]) -> Any:  # noqa: ANN401 (JSON)
    """Look until there is something, as it comes and goes; give it."""
    seen: list[Any] = []

    def has_news() -> bool:
        seen[:] = look()
        return bool(seen)

    wait_until(what, has_news)
    return seen[0]


def test_a_site_that_always_fails_rests_and_is_shown_with_the_reason(
    federation: Federation,
) -> None:
    run = "failing"
    broken = federation.sites["south"]
    cache = broken.config.blobs
    cache.rename(cache.with_name("kept"))
    cache.write_bytes(b"no directory")
    try:
        federation.start_run(run, **BUFFERED)
        federation.wait_for_rounds(run, 3)
        resting = wait_for_news("resting clients", lambda: shown_in_status(federation, run))
        assert resting["name"] == "south"
        assert resting["failures"] >= 1
        assert resting["reason"]
        listed = wait_for_news("a listed rest", lambda: shown_in_list(federation, "south"))
        assert listed["run"] == run
        assert listed["reason"] == resting["reason"]
    finally:
        cache.unlink()
        cache.with_name("kept").rename(cache)
    check_all(federation, run)
