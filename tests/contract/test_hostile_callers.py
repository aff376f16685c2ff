"""Callers that ask too often or too much at once: told so with a code, and nobody else is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import ClientId, UploadId
from fedra_edge.protocol.messages import FailureReport
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.config import ServerConfig
from fedra_server.http import fairness
from tests.support.headquarters import (
    PROTOCOL,
    Delta,
    Headquarters,
    Site,
    connection,
    headquarters,
    home_in,
)

Serve = Callable[..., Headquarters]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a server with limits of a test's own; refusals come without delay."""
    monkeypatch.setattr(fairness, "_HOLD_S", 0.0)
    with ExitStack() as stack:

        def start(**limits: object) -> Headquarters:
            config = ServerConfig.model_validate(limits)
            return stack.enter_context(headquarters(home_in(tmp_path), config))

        yield start


def code_of(answer: httpx.Response) -> ProblemCode | None:
    return None if answer.is_success else ProblemCode(answer.json()["code"])


def strange(hq: Headquarters, **headers: str) -> httpx.Response:
    """Ask as nobody in particular."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.get(f"{hq.url}/v1/clients/me", headers=PROTOCOL | told)


def twin(site: Site, hq: Headquarters, stack: ExitStack) -> Site:
    """Give the same client another connection."""
    http = stack.enter_context(connection(hq.url, site.http.headers))
    return Site(site.client_id, site.credential, http)


def test_who_asks_too_often_is_told_how_long_to_wait_and_others_are_served(serve: Serve) -> None:
    hq = serve(max_requests_per_s=1)
    with hq.site("quick") as quick, hq.site("slow") as slow:
        answers = [quick.call(routes.CLIENT_STATUS) for _ in range(20)]
        assert [it.status_code for it in answers[:5]] == [200] * 5
        assert code_of(answers[-1]) is ProblemCode.TOO_MANY_REQUESTS
        assert answers[-1].headers["Retry-After"] == "1"
        assert slow.call(routes.CLIENT_STATUS).status_code == 200
        threading.Event().wait(2.1)
        assert quick.call(routes.CLIENT_STATUS).status_code == 200


def test_more_sessions_bring_no_more(serve: Serve) -> None:
    hq = serve(max_requests_per_s=1)
    with hq.site("quick") as quick:
        while quick.call(routes.CLIENT_STATUS).status_code == 200:
            pass
        session = hq.services.sessions.open(ClientId(quick.client_id), hq.services.clock.now())
        headers = {"Authorization": f"Bearer {session}"}
        first = quick.call(
            routes.CLIENT_STATUS, headers=headers
        )  # only now it is known whose it is
        assert first.status_code == 200
        answer = quick.call(routes.CLIENT_STATUS, headers=headers)
        assert code_of(answer) is ProblemCode.TOO_MANY_REQUESTS


def test_a_client_waits_for_work_with_few_polls_at_once(serve: Serve) -> None:
    hq = serve(max_requests_at_once=4)
    with hq.site("many") as many, hq.site("one") as one, ExitStack() as stack:
        assert many.call(routes.CLIENT_STATUS).status_code == 200
        pool = stack.enter_context(ThreadPoolExecutor(8))
        polls = [
            pool.submit(twin(many, hq, stack).call, routes.ASSIGNMENT, params={"wait_s": "3"})
            for _ in range(8)
        ]
        codes = [code_of(it.result()) for it in polls]
        assert codes.count(None) == 4
        assert codes.count(ProblemCode.TOO_MANY_REQUESTS) == 4
        assert one.call(routes.CLIENT_STATUS).status_code == 200


def test_requests_about_deltas_do_not_take_the_threads_of_others(serve: Serve) -> None:
    """A sender that comes back waits in a thread for its earlier request to end."""
    hq = serve(max_uploads_at_once=2)
    with hq.run("run", min_participants=1), hq.site("wild", "run") as wild, ExitStack() as stack:
        upload_id = wild.announce(hq.delta(wild.work())).upload_id
        pool = stack.enter_context(ThreadPoolExecutor(8))
        with hq.services.receiving.hold(
            hq.services.store.upload(UploadId(upload_id)).assignment_id
        ):
            parts = {"upload_id": upload_id}
            asked = [
                pool.submit(twin(wild, hq, stack).call, routes.UPLOAD_OFFSET, parts=parts)
                for _ in range(8)
            ]
            statuses = sorted(it.result().status_code for it in asked)
        assert statuses == [200] * 2 + [429] * 6


def test_deltas_that_have_begun_are_finished_before_others_begin(serve: Serve) -> None:
    hq = serve(max_unfinished_uploads=1)
    with ExitStack() as stack:
        site = stack.enter_context(hq.site("plant"))
        deltas: list[Delta] = []
        for name in ("one", "two"):
            stack.enter_context(hq.run(name, min_participants=1))
            work = site.work()
            deltas.append(hq.delta(work))
            parts = {"assignment_id": work.assignment_id}
            site.call(routes.FAILURE, FailureReport(detail=""), parts=parts)
            hq.services.coordinator.wake()
        upload = site.announce(deltas[0])
        refused = site.call(routes.UPLOAD_CREATE, deltas[1].manifest)
        assert code_of(refused) is ProblemCode.TOO_MANY_UPLOADS
        assert site.append(upload.upload_id, deltas[0].data).status_code == 200
        assert site.send(deltas[1]).status_code in {200, 409}


def test_the_same_delta_is_not_taken_again_and_again(serve: Serve) -> None:
    hq = serve(max_transfers_per_round=1)
    with hq.run("run", min_participants=2), hq.site("wild", "run") as wild, hq.site("calm", "run"):
        delta = hq.delta(wild.work())
        upload = wild.announce(delta)
        wrong = bytes(len(delta.data))
        hq.services.note_sent(hq.services.store.upload(UploadId(upload.upload_id)), 16 * 2**20)
        codes = [code_of(wild.append(upload.upload_id, wrong)) for _ in range(30)]
        assert codes[0] is ProblemCode.DIGEST_MISMATCH
        assert codes[-1] is ProblemCode.TRANSFER_EXHAUSTED


def test_strangers_of_one_address_are_paced_and_members_there_are_not(serve: Serve) -> None:
    hq = serve(max_strange_requests_per_s=2)
    with hq.site("member") as member:
        assert member.call(routes.CLIENT_STATUS).status_code == 200
        answers = [strange(hq, Authorization=f"Bearer {guess}") for guess in range(30)]
        assert code_of(answers[0]) is ProblemCode.NOT_AUTHENTICATED
        assert code_of(answers[-1]) is ProblemCode.TOO_MANY_REQUESTS
        assert int(answers[-1].headers["Retry-After"]) >= 1
        assert member.call(routes.CLIENT_STATUS).status_code == 200


@pytest.mark.parametrize("is_trusted", [False, True])
def test_a_forwarded_address_is_believed_of_trusted_proxies_only(
    serve: Serve, is_trusted: bool
) -> None:
    hq = serve(max_strange_requests_per_s=2, trusted_proxies=["127.0.0.0/8"] if is_trusted else [])
    forged = [strange(hq, X_Forwarded_For=f"203.0.113.{n}") for n in range(100)]
    refused = sum(code_of(it) is ProblemCode.TOO_MANY_REQUESTS for it in forged)
    assert refused == 0 if is_trusted else refused > 10


def test_answers_to_a_flood_come_late_and_end_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fairness, "_HOLD_S", 2.0)
    monkeypatch.setattr(fairness, "_MOST_HELD", 2)
    config = ServerConfig(max_requests_per_s=1)
    with headquarters(home_in(tmp_path), config) as hq, ExitStack() as stack:
        site = stack.enter_context(hq.site("wild"))
        for _ in range(12):
            site.call(routes.CLIENT_STATUS)
        pool = stack.enter_context(ThreadPoolExecutor(6))
        asked = [pool.submit(twin(site, hq, stack).call, routes.CLIENT_STATUS) for _ in range(6)]
        answers = [it.result() for it in asked]
        assert {code_of(it) for it in answers} <= {ProblemCode.TOO_MANY_REQUESTS, None}
        assert sum(it.headers.get("Connection") == "close" for it in answers) >= 2
