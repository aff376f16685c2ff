"""The wire contract as a client meets it: membership, polling, evaluation, health, document."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import httpx
import pytest

from fedra_edge.protocol import routes
from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.messages import (
    ClientStatus,
    FailureReport,
    Heartbeat,
    RejoinRequest,
)
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.problems import PROBLEM_MEDIA_TYPE
from fedra_edge.protocol.rounds import Evaluation
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.version import PROTOCOL_HEADER, PROTOCOL_VERSION
from fedra_server.config import ServerConfig
from tests.contract.conftest import Participants
from tests.support.builders import make_block_memory, make_profile
from tests.support.headquarters import (
    PROTOCOL,
    Headquarters,
    Site,
    connection,
    headquarters,
    home_in,
)
from tests.support.keys import SiteKey, authority_of

ALL_ROUTES = [value for value in vars(routes).values() if isinstance(value, routes.Route)]


def status_of(site: Site) -> ClientStatus:
    return ClientStatus.model_validate_json(site.call(routes.CLIENT_STATUS).content)


def test_the_openapi_document_names_every_route_and_every_problem(hq: Headquarters) -> None:
    document = httpx.get(f"{hq.url}/openapi.json").json()
    served = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert served == {(route.method, route.path) for route in ALL_ROUTES}
    for path in document["paths"].values():
        for operation in path.values():
            assert PROBLEM_MEDIA_TYPE in operation["responses"]["422"]["content"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


@pytest.mark.parametrize("path", ["/health/live", "/openapi.json", "/nowhere"])
def test_every_answer_states_the_protocol(hq: Headquarters, path: str) -> None:
    assert httpx.get(f"{hq.url}{path}").headers[PROTOCOL_HEADER] == PROTOCOL_VERSION


def test_a_client_enrols_comes_back_goes_offline_and_leaves(hq: Headquarters) -> None:
    with hq.site("plant 7", calibrated=False) as site:
        status = status_of(site)
        assert (status.client_id, status.name, status.run) == (site.client_id, "plant 7", None)
        assert status.is_online
        assert status.open_assignment is None
        profile = make_profile(memory_bytes=2**31)
        assert site.call(routes.REJOIN, RejoinRequest(profile=profile)).status_code == 200
        [record] = [it for it in hq.services.store.clients() if it.client_id == site.client_id]
        assert record.profile == profile
        assert site.call(routes.OFFLINE).status_code == 204
        assert not status_of(site).is_online
        assert site.call(routes.LEAVE).status_code == 204
        answer = site.call(routes.CLIENT_STATUS)
        assert (answer.status_code, answer.json()["code"]) == (403, "client-revoked")


def test_a_session_is_stored_nowhere(hq: Headquarters, site: Site) -> None:
    for path in hq.services.home.path.rglob("*"):
        if path.is_file():
            assert site.credential.encode() not in path.read_bytes()


def test_a_model_is_described_so_that_it_keeps_its_identity(hq: Headquarters, site: Site) -> None:
    with hq.run("described", min_participants=100):
        answer = site.call(routes.MODEL, parts={"model_id": hq.spec.model_id})
    assert ModelSpec.model_validate_json(answer.content).model_id == hq.spec.model_id
    assert "immutable" in answer.headers["Cache-Control"]


def test_who_has_not_calibrated_is_asked_to(hq: Headquarters) -> None:
    with hq.run("calibrating"), hq.site("new", "calibrating", calibrated=False) as site:
        answer = site.call(routes.ASSIGNMENT, params={"wait_s": "20"})
        assert answer.json()["calibrate"] == hq.spec.model_id


def test_a_waiting_client_hears_of_its_work_at_once(hq: Headquarters) -> None:
    moments: dict[str, float] = {}

    def poll(site: Site) -> None:
        site.work(wait_s=20)
        moments["answered"] = time.monotonic()

    with hq.run("awaited", min_participants=2), hq.site("first", "awaited") as first:
        poller = threading.Thread(target=poll, args=(first,))
        poller.start()
        with hq.site("second", "awaited"):
            moments["complete"] = time.monotonic()
            poller.join(timeout=20)
    assert moments["answered"] - moments["complete"] < 2


def test_a_wait_is_never_longer_than_the_protocol_allows(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "MAX_POLL_S", 0.2)
    started = time.monotonic()
    assert site.call(routes.ASSIGNMENT, params={"wait_s": "1000"}).json()["kind"] == "wait"
    assert 0.2 <= time.monotonic() - started < 5


def test_waiting_clients_hold_no_threads(hq: Headquarters, site: Site) -> None:
    """Far more polls than a thread pool has threads wait, and the server still answers."""

    async def poll_together() -> float:
        headers = {**PROTOCOL, "Authorization": f"Bearer {site.credential}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=hq.url, headers=headers, timeout=60, limits=limits
        ) as http:
            polls = [http.get("/v1/assignment", params={"wait_s": "3"}) for _ in range(100)]
            waiting = asyncio.gather(*polls)
            await asyncio.sleep(1.5)
            asked = time.monotonic()
            assert (await http.get("/v1/clients/me")).status_code == 200
            answered_s = time.monotonic() - asked
            assert {answer.json()["kind"] for answer in await waiting} == {"wait"}
            return answered_s

    assert asyncio.run(poll_together()) < 1


def test_a_heartbeat_tells_whether_the_work_is_still_wanted(
    participant: tuple[Site, SliceManifest],
) -> None:
    site, manifest = participant
    beat = Heartbeat(assignment_id=manifest.assignment_id, steps_done=1, steps_total=9)
    assert site.call(routes.HEARTBEAT, beat).json() == {"is_wanted": True}
    assert status_of(site).open_assignment == manifest.assignment_id
    parts = {"assignment_id": manifest.assignment_id}
    report = FailureReport(detail="out of memory")
    assert site.call(routes.FAILURE, report, parts=parts).status_code == 204
    assert site.call(routes.FAILURE, report, parts=parts).status_code == 204
    assert site.call(routes.HEARTBEAT, beat).json() == {"is_wanted": False}


def test_nobody_waits_for_a_client_that_left(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, manifest = participant
    assert site.call(routes.LEAVE).status_code == 204
    assert hq.services.store.assignment(manifest.id).state == "failed"


def test_a_client_that_said_goodbye_finds_its_work_again_and_nobody_waits_meanwhile(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, manifest = participant
    before = hq.services.store.progress(manifest.run, 0.0)
    assert site.call(routes.OFFLINE).status_code == 204
    meanwhile = hq.services.store.progress(manifest.run, 0.0)
    assert (meanwhile.at_work, meanwhile.silent) == (before.at_work - 1, before.silent)
    assert site.work().assignment_id == manifest.assignment_id
    assert hq.services.store.progress(manifest.run, 0.0) == before


def test_an_evaluation_can_be_repeated(hq: Headquarters, site: Site) -> None:
    with hq.run("evaluated", min_participants=100):
        for correct in (3, 4):
            evaluation = Evaluation(
                run="evaluated", revision=0, num_examples=10, num_correct=correct, loss_sum=2.5
            )
            assert site.call(routes.EVALUATION, evaluation).status_code == 204
    [record] = hq.services.store.evaluations("evaluated")
    assert record.evaluation.num_correct == 4


def test_a_client_reports_on_no_more_examples_than_it_has(hq: Headquarters, site: Site) -> None:
    honest = Evaluation(run="weighed", revision=0, num_examples=10, num_correct=3, loss_sum=2.5)
    with hq.run("weighed", min_participants=100), hq.site("new", calibrated=False) as new:
        inflated = honest.model_copy(update={"num_examples": 11})
        for sender, evaluation in ((site, inflated), (new, honest)):
            answer = sender.call(routes.EVALUATION, evaluation)
            assert (answer.status_code, answer.json()["code"]) == (403, "not-permitted")
            assert answer.json()["remedy"].startswith("Calibrate")
        unknown = honest.model_copy(update={"revision": 9})
        assert site.call(routes.EVALUATION, unknown).status_code == 404
    assert hq.services.store.evaluations("weighed") == []


@pytest.mark.parametrize("revision", [2**31, 2**63, 2**200])
def test_no_number_is_too_large_to_be_refused(site: Site, revision: int) -> None:
    honest = Evaluation(run="any", revision=0, num_examples=1, num_correct=1, loss_sum=0.5)
    answer = site.call(routes.EVALUATION, honest.model_copy(update={"revision": revision}))
    assert (answer.status_code, answer.json()["code"]) == (422, "malformed-request")


def test_a_time_that_no_clock_can_measure_is_refused(hq: Headquarters, site: Site) -> None:
    honest = Calibration(
        model_id=hq.spec.model_id,
        forward_s=0.0,
        backward_s=1e-9,
        memory=make_block_memory(),
        train_examples=1,
        held_out_examples=0,
    )
    assert site.call(routes.CALIBRATE, honest).status_code == 204
    answer = site.call(routes.CALIBRATE, honest.model_copy(update={"backward_s": 1e-300}))
    assert (answer.status_code, answer.json()["code"]) == (422, "malformed-request")


def test_a_client_whose_poll_is_held_counts_as_alive(tmp_path: Path) -> None:
    config = ServerConfig(heartbeat_timeout_s=1)
    with headquarters(home_in(tmp_path), config) as running, running.site("waiting") as site:
        services = running.services
        store, client_id = services.store, ClientId(site.client_id)
        with connection(running.url, site.http.headers) as http:
            waiting = Site(site.client_id, site.credential, http)
            poller = threading.Thread(
                target=lambda: waiting.call(routes.ASSIGNMENT, params={"wait_s": "3"})
            )
            poller.start()
            silences = []
            while poller.is_alive():
                silences.append(services.clock.now() - store.client(client_id).last_seen_at)
                poller.join(0.1)
        assert max(silences) < config.heartbeat_timeout_s


def test_a_held_poll_brings_nobody_back_who_said_goodbye(tmp_path: Path) -> None:
    config = ServerConfig(heartbeat_timeout_s=1)
    with headquarters(home_in(tmp_path), config) as running, running.site("leaving") as site:
        with connection(running.url, site.http.headers) as http:
            waiting = Site(site.client_id, site.credential, http)
            poller = threading.Thread(
                target=lambda: waiting.call(routes.ASSIGNMENT, params={"wait_s": "20"})
            )
            poller.start()
            poller.join(0.5)
            assert site.call(routes.OFFLINE).status_code == 204
            poller.join(5)
            assert not poller.is_alive()
        assert not status_of(site).is_online


def test_two_admitted_deltas_make_the_next_round(
    hq: Headquarters, participants: Participants
) -> None:
    (first, one), (second, two) = participants()
    assert first.send(hq.delta(one)).status_code == 200
    assert second.send(hq.delta(two)).status_code == 200
    following = first.work()
    assert (following.round_number, following.revision.number) == (2, 1)
    assert status_of(first).rounds_contributed == 1


def test_health_tells_of_a_disk_that_takes_no_files(hq: Headquarters) -> None:
    assert httpx.get(f"{hq.url}/health/live").json()["status"] == "ok"
    assert httpx.get(f"{hq.url}/health/ready").json()["status"] == "ok"
    uploads = hq.services.home.uploads
    aside = uploads.rename(uploads.with_name("aside"))
    try:
        answer = httpx.get(f"{hq.url}/health/ready")
    finally:
        aside.rename(uploads)
    assert answer.status_code == 503
    assert answer.json()["status"] == "unavailable"


def test_a_crowd_that_enrols_is_told_to_come_back_later(tmp_path: Path) -> None:
    config = ServerConfig(max_enrolments_per_minute=1)
    with headquarters(home_in(tmp_path), config) as running, running.site("one") as site:
        answer = site.call(routes.ENROL, SiteKey().enrolment(authority_of(site.http).ca_sha256))
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1


def test_the_population_has_a_limit(tmp_path: Path) -> None:
    config = ServerConfig(max_clients=1)
    with headquarters(home_in(tmp_path), config) as running, running.site("one") as site:
        answer = site.call(routes.ENROL, SiteKey().enrolment(authority_of(site.http).ca_sha256))
    assert answer.status_code == 403
    assert "max_clients" in answer.json()["remedy"]
