"""The last step of an upload: it loses nothing, waits for no other run, and frees its space."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import httpx

from fedra_edge.protocol.ids import RunId
from fedra_edge.protocol.slices import SliceManifest
from fedra_server.http.discarding import discard_dead_uploads
from fedra_server.storage.quotas import DiskQuota, measure_use
from tests.contract.conftest import Participants
from tests.support.headquarters import Delta, Headquarters, Site

PLENTY = 2**40


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    pause = threading.Event()
    while not is_so():
        assert time.monotonic() < deadline
        pause.wait(0.01)


def test_what_began_before_a_start_counts_towards_the_limit(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    site.append(site.announce(delta).upload_id, delta.data[:5], complete=False)
    wait_until(lambda: not hq.services.receiving.is_held(work.id))
    limit_bytes = measure_use(hq.services.home).total + len(delta.data) - 5
    services = replace(hq.services, quota=DiskQuota(hq.services.home, limit_bytes))
    discard_dead_uploads(services)
    now = services.clock.now()
    told = services.quota.shortage(free_bytes=PLENTY, now=now)
    assert told == f"max_disk_bytes allows {limit_bytes}, of which {limit_bytes} are taken"


def test_a_delta_announced_anew_frees_the_space_of_the_one_before(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    size_bytes = 1000
    for index in range(5):
        site.announce(Delta.of(bytes([index]) * size_bytes, work.assignment_id))
    claims = hq.services.quota._awaited.values()
    assert [awaited_bytes for awaited_bytes, *_ in claims].count(size_bytes) == 1


def test_a_delta_that_cannot_be_recorded_is_not_sent_again(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)
    refuse = (
        "CREATE TRIGGER refuse BEFORE UPDATE ON assignments WHEN NEW.state = 'admitted' "
        "BEGIN SELECT RAISE(ABORT, 'not now'); END"
    )
    with closing(sqlite3.connect(hq.services.home.database_file)) as database:
        database.execute(refuse)
        assert site.append(upload.upload_id, delta.data).status_code == 409
        database.execute("DROP TRIGGER refuse")
    assert site.announce(delta).offset_bytes == len(delta.data)
    assert site.append(upload.upload_id, b"", offset=len(delta.data)).status_code == 200
    assert hq.services.home.delta_file(work.id).read_bytes() == delta.data


def test_a_run_whose_merge_takes_its_time_keeps_no_other_waiting(
    hq: Headquarters, participants: Participants
) -> None:
    slow, quick = participants(), participants()
    run = RunId(slow[0][1].run)
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(target=lambda s=site, w=work: answers.append(s.send(hq.delta(w))))
        for site, work in slow
    ]
    with hq.services.coordinator.intake._locks.of(run):
        for thread in threads:
            thread.start()
        wait_until(lambda: hq.services.counting[run].statistics().tasks_waiting == 1)
        for site, work in quick:
            assert site.send(hq.delta(work)).status_code == 200
        assert not answers
    for thread in threads:
        thread.join(20)
    assert [answer.status_code for answer in answers] == [200, 200]
