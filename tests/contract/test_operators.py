"""Who may call what: every route of the application, with every kind of credential."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Final

import httpx
import pytest
from fastapi.routing import iter_route_contexts

from fedra_edge.protocol import routes
from fedra_edge.protocol.problems import Problem, ProblemCode
from fedra_edge.protocol.routes import Route
from fedra_edge.protocol.trust import JoinString
from fedra_server.chain import BrokenChain
from fedra_server.http.app import create_app
from fedra_server.roles import OperatorRecord, Role
from fedra_server.runs import RunState
from fedra_server.storage.operators import new_operator_secret
from tests.support.headquarters import PROTOCOL, Headquarters, Site, connection
from tests.support.keys import SiteKey

PUBLIC: Final = {
    routes.LIVE, routes.READY, routes.AUTHORITY, routes.CHALLENGE, routes.SESSION, routes.ENROL,
}  # fmt: skip
NEEDED: Final[Mapping[Route, Role]] = {
    routes.METRICS: Role.SCRAPE,
    routes.OPERATOR_RUNS: Role.VIEW,
    routes.OPERATOR_RUN: Role.VIEW,
    routes.OPERATOR_CLIENTS: Role.VIEW,
    routes.OPERATOR_JOURNAL: Role.VIEW,
    routes.OPERATOR_QUARANTINE: Role.VIEW,
    routes.OPERATOR_STEER: Role.OPERATE,
    routes.OPERATOR_REMOVE_CLIENT: Role.ADMINISTER,
    routes.OPERATOR_TOKENS: Role.ADMINISTER,
    routes.OPERATOR_CREATE_TOKEN: Role.ADMINISTER,
    routes.OPERATOR_REVOKE_TOKEN: Role.ADMINISTER,
}
ALLOWED: Final[Mapping[Role, set[Role]]] = {
    Role.SCRAPE: {Role.SCRAPE},
    Role.VIEW: {Role.SCRAPE, Role.VIEW},
    Role.OPERATE: {Role.SCRAPE, Role.VIEW, Role.OPERATE},
    Role.ADMINISTER: set(Role),
}
ROUTES: Final = [value for value in vars(routes).values() if isinstance(value, Route)]
Ask = Callable[[Route, str | None], httpx.Response]


def name_of(route: Route) -> str:
    return f"{route.method} {route.path}"


@pytest.fixture
def ask(hq: Headquarters) -> Iterator[Ask]:
    """Call a route with a credential, about things that are not there."""
    with httpx.Client(base_url=hq.url, headers=PROTOCOL, timeout=30) as http:

        def call(route: Route, secret: str | None, **parts: str) -> httpx.Response:
            names = dict.fromkeys(re.findall(r"{(\w+)}", route.path), "nowhere")
            known = {"step": "pause", "sha256": "0" * 64, "model_id": "0" * 64}
            told = b"" if secret is None else b"Bearer " + secret.encode("latin-1")
            headers = {b"Authorization": told} if told else {}
            path = route.fill(
                **{**names, **{k: v for k, v in known.items() if k in names}, **parts}
            )
            return http.request(route.method, path, headers=headers)

        yield call


@pytest.fixture
def operator(hq: Headquarters) -> Callable[..., str]:
    """Let an operator in and give its secret."""

    def add(role: Role, name: str = "", expires_at: float | None = None) -> str:
        secret = new_operator_secret()
        place = len(hq.services.store.operators())
        record = OperatorRecord(name or f"{role}-{place}", role, time.time(), expires_at)
        hq.services.store.add_operator(record, secret)
        return secret

    return add


def code_of(answer: httpx.Response) -> ProblemCode | None:
    is_problem = "problem" in answer.headers.get("Content-Type", "")
    return (
        Problem.model_validate_json(answer.content).code if is_problem and answer.content else None
    )


def test_every_route_is_public_by_list_or_needs_somebody(hq: Headquarters) -> None:
    served = {
        Route(method, route.path or "")
        for route in iter_route_contexts(create_app(hq.services).routes)
        if route.path != "/openapi.json"
        for method in route.methods or ()
    }
    assert served == set(ROUTES)
    assert not PUBLIC & NEEDED.keys()
    for route in served - PUBLIC - NEEDED.keys():
        assert not route.path.startswith("/v1/operator"), name_of(route)


@pytest.mark.parametrize("route", [it for it in ROUTES if it not in PUBLIC], ids=name_of)
def test_nobody_and_strangers_are_turned_away(ask: Ask, route: Route) -> None:
    for secret in (None, "a" * 43, "op-" + "0" * 64, "\u00e4" * 3):
        answer = ask(route, secret)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize("route", NEEDED, ids=name_of)
def test_a_role_opens_what_it_should_and_nothing_more(
    ask: Ask, operator: Callable[..., str], route: Route
) -> None:
    for role in Role:
        answer = ask(route, operator(role))
        if NEEDED[route] in ALLOWED[role]:
            assert answer.status_code in {200, 404, 422}, (role, answer.text)
        else:
            assert code_of(answer) is ProblemCode.ROLE_INSUFFICIENT, (role, answer.text)
            assert answer.status_code == 403
            assert f"the role {NEEDED[route]}" in answer.json()["detail"]


@pytest.mark.parametrize(
    "route", [it for it in ROUTES if it not in PUBLIC and it not in NEEDED], ids=name_of
)
def test_an_operator_is_nobody_where_clients_call(
    ask: Ask, operator: Callable[..., str], route: Route
) -> None:
    assert ask(route, operator(Role.ADMINISTER)).status_code == 401


@pytest.mark.parametrize("route", NEEDED, ids=name_of)
def test_a_client_is_nobody_where_operators_call(ask: Ask, site: Site, route: Route) -> None:
    assert ask(route, site.credential).status_code == 401


@pytest.mark.parametrize("path", ["/v1/clients", "/v1/runs"])
def test_who_looks_in_the_wrong_place_is_told_of_the_right_one(
    hq: Headquarters, operator: Callable[..., str], path: str
) -> None:
    headers = {**PROTOCOL, "Authorization": f"Bearer {operator(Role.VIEW)}"}
    refusal = httpx.get(f"{hq.url}{path}", headers=headers)
    assert refusal.status_code in {404, 405}
    assert "/v1/operator/" in refusal.json()["remedy"]


def test_an_operator_that_expired_or_was_removed_is_nobody(
    hq: Headquarters, ask: Ask, operator: Callable[..., str]
) -> None:
    assert (
        ask(routes.OPERATOR_RUNS, operator(Role.VIEW, expires_at=time.time() - 1)).status_code
        == 401
    )
    secret = operator(Role.VIEW, "leaving", time.time() + 600)
    assert ask(routes.OPERATOR_RUNS, secret).status_code == 200
    hq.services.store.remove_operator("leaving")
    assert ask(routes.OPERATOR_RUNS, secret).status_code == 401


def test_a_run_is_steered_and_the_journal_says_by_whom(
    hq: Headquarters, ask: Callable[..., httpx.Response], operator: Callable[..., str]
) -> None:
    secret = operator(Role.OPERATE, "night-shift")
    with hq.run("steered") as record:
        parts = {"run": record.run}
        seen = [ask(routes.OPERATOR_STEER, secret, **parts, step=it) for it in ("pause", "start")]
        assert [it.json()["state"] for it in seen] == ["paused", "running"]
        again = ask(routes.OPERATOR_STEER, secret, **parts, step="start")
        assert (again.status_code, code_of(again)) == (409, ProblemCode.STATE_CONFLICT)
        assert ask(routes.OPERATOR_STEER, secret, **parts, step="stop").status_code == 200
        assert hq.services.store.run(record.run).state is RunState.STOPPED
        assert ask(routes.OPERATOR_RUN, secret, **parts).json()["state"] == "stopped"
        listed = ask(routes.OPERATOR_RUNS, secret).json()["runs"]
        assert {it["run"]: it["state"] for it in listed}["steered"] == "stopped"
    by_operator = [
        it.event for it in hq.services.store.journal() if it.by == "operator night-shift"
    ]  # fmt: skip
    assert by_operator == ["run-paused", "run-resumed", "run-stopped"]


def test_a_client_is_removed_at_once(
    hq: Headquarters, ask: Callable[..., httpx.Response], operator: Callable[..., str]
) -> None:
    secret = operator(Role.ADMINISTER, "gate")
    with hq.site("removed by gate") as site:
        listed = ask(routes.OPERATOR_CLIENTS, secret).json()["clients"]
        assert {it["client_id"]: it["state"] for it in listed}[site.client_id] == "online"
        parts = {"client_id": site.client_id}
        assert ask(routes.OPERATOR_REMOVE_CLIENT, secret, **parts).status_code == 204
        refused = site.call(routes.CLIENT_STATUS)
        assert code_of(refused) is ProblemCode.CLIENT_REVOKED
        assert ask(routes.OPERATOR_REMOVE_CLIENT, secret, **parts).status_code == 404
    [entry] = [it for it in hq.services.store.journal() if it.event == "client-removed"]
    assert (entry.subject, entry.by) == (site.client_id, "operator gate")


def test_a_token_made_over_http_admits_and_a_revoked_one_does_not(
    hq: Headquarters, operator: Callable[..., str]
) -> None:
    secret = operator(Role.ADMINISTER, "porter")
    with connection(hq.url, {**PROTOCOL, "Authorization": f"Bearer {secret}"}) as http:
        wish = {"uses": 2, "ttl_s": 60, "label": "plant-7", "address": "https://hq.example/fedra"}
        made = http.post(routes.OPERATOR_CREATE_TOKEN.path, json=wish).json()
        token = made["token"]
        join_string = JoinString.parse(made["join_string"])
        assert (join_string.address, join_string.ca_sha256) == (
            "https://hq.example/fedra", hq.services.authority.ca_sha256,
        )  # fmt: skip
        joined = httpx.post(
            f"{hq.url}{routes.ENROL.path}",
            headers=PROTOCOL,
            json=SiteKey().enrolment(
                join_string.ca_sha256, join_secret=join_string.secret
            ).model_dump(mode="json"),
        )  # fmt: skip
        assert joined.status_code == 201, joined.text
        [listed] = [
            it
            for it in http.get(routes.OPERATOR_TOKENS.path).json()["tokens"]
            if it["token_id"] == token["token_id"]
        ]
        assert (listed["uses_left"], listed["state"]) == (1, "usable")
        path = routes.OPERATOR_REVOKE_TOKEN.fill(token_id=token["token_id"])
        assert http.delete(path).status_code == 204
        assert join_string.secret not in http.get(routes.OPERATOR_JOURNAL.path).text
        wrong = [{"uses": 0}, {"ttl_s": 0}, {"label": "\u0000"}, {"address": "ftp://x"},
                 {"uses": 2, "client_id": "x"}, {"more": 1}]  # fmt: skip
        for body in wrong:
            refusal = http.post(routes.OPERATOR_CREATE_TOKEN.path, json=body)
            assert refusal.status_code == 422, body
            assert "openapi" in refusal.json()["remedy"]
            assert "client software" not in refusal.json()["remedy"]
    refused = httpx.post(
        f"{hq.url}{routes.ENROL.path}",
        headers=PROTOCOL,
        json=SiteKey().enrolment(
            join_string.ca_sha256, join_secret=join_string.secret
        ).model_dump(mode="json"),
    )  # fmt: skip
    assert code_of(refused) is ProblemCode.JOIN_TOKEN_INVALID
    told = [
        it.event for it in hq.services.store.journal() if it.by == "operator porter"
    ]  # fmt: skip
    assert told == ["token-created", "token-revoked"]


def test_the_journal_is_read_in_pages_that_chain(
    hq: Headquarters, operator: Callable[..., str]
) -> None:
    secret = operator(Role.VIEW)
    headers = {**PROTOCOL, "Authorization": f"Bearer {secret}"}
    url = f"{hq.url}{routes.OPERATOR_JOURNAL.path}"
    pages = [
        httpx.get(url, headers=headers, params={"since": since, "limit": 2}).json()
        for since in (1, 3)
    ]  # fmt: skip
    entries = [entry for page in pages for entry in page["entries"]]
    assert [it["sequence"] for it in entries] == [1, 2, 3, 4]
    assert all(
        later["previous_sha256"] == earlier["sha256"] for earlier, later in pairwise(entries)
    )
    whole = httpx.get(url, headers=headers, params={"limit": 1000}).json()
    last = whole["entries"][-1]
    assert whole["head"] == f"{last['sequence']}:{last['sha256']}"
    assert not isinstance(hq.services.store.verify_journal(), BrokenChain)


def test_a_scraper_reads_figures(hq: Headquarters, ask: Ask, operator: Callable[..., str]) -> None:
    with hq.run("scraped"), hq.site("watched"):
        text = ask(routes.METRICS, operator(Role.SCRAPE)).text
    figures = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")
    )  # fmt: skip
    assert float(figures["fedra_clients_online"]) >= 1
    assert float(figures['fedra_rounds_published_total{run="scraped"}']) == 0
    assert float(figures['fedra_run_state{run="scraped",state="running"}']) == 1
    assert float(figures["fedra_stored_bytes"]) > 0
    assert float(figures["fedra_disk_free_bytes"]) > 0
    assert float(figures["fedra_merge_seconds_count"]) >= 0
    assert float(figures["fedra_journal_entries_total"]) >= 2
