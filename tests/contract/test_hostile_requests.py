"""Requests that no client of ours would send, over raw sockets: each refused, with its own code."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedra_edge.protocol.problems import PROBLEM_MEDIA_TYPE, ProblemCode
from fedra_server.config import ServerConfig
from fedra_server.http import limits
from fedra_server.http.problems import ANSWERS
from tests.support.headquarters import PROTOCOL, Headquarters, Site, headquarters, home_in
from tests.support.hostile_forms import EVALUATE, FORMS, HOST, JSON, LIVE, get, post
from tests.support.offers import offer
from tests.support.raw_http import RawAnswer, ask, head, raw_connection


def check(answer: RawAnswer, code: ProblemCode) -> None:
    assert answer.headers["content-type"] == PROBLEM_MEDIA_TYPE
    problem = answer.problem
    assert (problem.code, problem.status) == (code, answer.status), problem
    assert answer.status == ANSWERS[code].status
    assert problem.remedy.endswith(".")


@pytest.mark.parametrize("form", FORMS)
def test_it_is_refused_with_its_own_code(hq: Headquarters, site: Site, form: str) -> None:
    code, write = FORMS[form]
    check(ask(hq.url, write(site)), code)
    assert ask(hq.url, get(LIVE)).status == 200


@pytest.mark.parametrize(
    "form", ["length and chunks", "another server", "a compressed body", "no HTTP at all"]
)
def test_what_follows_it_on_its_connection_is_never_read(
    hq: Headquarters, site: Site, form: str
) -> None:
    with raw_connection(hq.url) as connection:
        connection.send(FORMS[form][1](site) + get(LIVE))
        assert connection.answer().status >= 400
        assert connection.is_closed


def test_requests_sent_ahead_are_answered_one_after_the_other(hq: Headquarters) -> None:
    with raw_connection(hq.url) as connection:
        connection.send(get(LIVE) * 20 + get("/nowhere") + get(LIVE))
        assert [connection.answer().status for _ in range(22)] == [200] * 20 + [404, 200]


def test_a_body_is_asked_for_when_the_sender_waits_for_that(hq: Headquarters, site: Site) -> None:
    with raw_connection(hq.url) as connection:
        request = post(site, b"{}", Expect="100-continue")
        connection.send(request[:-2])
        assert connection.answer().status == 100
        connection.send(request[-2:])
        check(connection.answer(), ProblemCode.MALFORMED_REQUEST)


def test_chunks_without_end_are_cut_at_the_limit(hq: Headquarters, site: Site) -> None:
    own = {"Authorization": f"Bearer {site.credential}", "Transfer-Encoding": "chunked"}
    with raw_connection(hq.url) as connection:
        connection.send(head("POST", EVALUATE, HOST | PROTOCOL | JSON | own))
        connection.send(b"1;extension=of-any-kind\r\n \r\n" * 110_000)
        check(connection.answer(), ProblemCode.REQUEST_TOO_LARGE)


def test_a_body_that_drips_is_given_up(
    hq: Headquarters, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_MAX_BODY_S", 0.3)
    with raw_connection(hq.url) as connection:
        connection.send(post(site, b"{}" + b" " * 100)[:-50])
        check(connection.answer(), ProblemCode.BODY_TOO_SLOW)


def test_a_client_reads_what_its_runs_offer_and_nothing_else(hq: Headquarters) -> None:
    [own] = offer(hq, b"the weights of one", run="one")
    [other] = offer(hq, b"the weights of another", run="another")
    hidden = hq.services.blobs.put_bytes(b"of no run").sha256
    with hq.site("bound", "one") as bound, hq.site("free") as free:
        assert [status(bound, it) for it in (own, other, hidden, "0" * 64)] == [200, 403, 403, 403]
        assert [status(free, it) for it in (own, other, hidden, "0" * 64)] == [200, 200, 403, 403]
        refused = [ask(hq.url, get(f"/v1/blobs/{it}", signed(bound))) for it in (hidden, "0" * 64)]
        assert {it.problem.code for it in refused} == {ProblemCode.NOT_ASSIGNED}
        both = ask(hq.url, get(f"/v1/blobs?sha256={own},{other}", signed(bound)))
        check(both, ProblemCode.NOT_ASSIGNED)
        [of_other] = [it for it in hq.services.store.models() if it.spec.name == "another"]
        check(
            ask(hq.url, get(f"/v1/models/{of_other.model_id}", signed(bound))),
            ProblemCode.NOT_ASSIGNED,
        )


def test_far_more_than_a_round_needs_is_not_sent(tmp_path: Path) -> None:
    body = bytes(2**20)
    config = ServerConfig(max_transfers_per_round=1)
    with headquarters(home_in(tmp_path), config) as running:
        [sha256] = offer(running, body)
        with running.site("greedy") as greedy, running.site("modest") as modest:
            statuses = [status(greedy, sha256) for _ in range(80)]
            assert statuses[:60] == [200] * 60
            assert statuses[-1] == 429
            late = ask(running.url, get(f"/v1/blobs/{sha256}", signed(greedy)))
            check(late, ProblemCode.TRANSFER_EXHAUSTED)
            assert 1 <= int(late.headers["retry-after"]) <= 3600
            assert status(modest, sha256) == 200


def signed(site: Site) -> dict[str, str]:
    return HOST | PROTOCOL | {"Authorization": f"Bearer {site.credential}"}


def status(site: Site, sha256: str) -> int:
    return site.http.get(f"/v1/blobs/{sha256}").status_code
