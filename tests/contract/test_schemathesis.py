"""Every operation of the served OpenAPI document, called by a machine in right and wrong ways."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from fedra_edge.protocol import routes
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.routes import Route
from fedra_server.config import ServerConfig, ServerHome
from fedra_server.inviting import TokenWish, invite
from fedra_server.roles import OperatorRecord, Role
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.operators import new_operator_secret
from fedra_server.storage.store import Store
from tests.support.headquarters import (
    Site,
    calibrate,
    connection,
    create_run,
    enrol,
    honest_delta,
    register_model,
)
from tests.support.servers import ServerProcess, running_server

ROUTES: Final = {
    name: value for name, value in vars(routes).items() if isinstance(value, Route)
}  # fmt: skip
WITHOUT_PARAMETERS: Final = {routes.LIVE, routes.READY, routes.AUTHORITY}
"""There is no wrong way to call these."""
RULES_BEYOND_A_SCHEMA: Final = {
    routes.CALIBRATE, routes.EVALUATION, routes.UPLOAD_APPEND, routes.UPLOAD_WHOLE,
    routes.OPERATOR_CREATE_TOKEN,
}  # fmt: skip
"""Their bodies can fit the document and still be refused: 422, with the reason."""
REFUSALS: Final = [
    "400", "401", "403", "404", "405", "409", "413", "415", "416", "417", "422", "426", "431",
]  # fmt: skip
"""No status from 500 on is among them: this server has room and enrolls at any rate."""
EXAMPLES: Final = os.environ.get("FEDRA_FUZZ_EXAMPLES")
"""Set, it draws so many new calls at each run; else the calls are always the same few."""
LONGEST_POLL_S: Final = 0.01

SETTINGS: Final = settings(
    max_examples=int(EXAMPLES or 25),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@dataclass(frozen=True)
class Target:
    """A server process, its document, and names of things that are there."""

    server: ServerProcess
    schema: Any
    spec: ModelSpec
    operator: str
    token_id: str


@dataclass(frozen=True)
class Participant:
    """A client with work and an upload that has begun."""

    site: Site
    operator: str
    known: dict[str, str]

    def authorization(self, route: Route) -> dict[str, str]:
        """Give the credential of who may call a route: an administrator, or the client."""
        secret = self.operator if "operator" in route.path or route is routes.METRICS else None
        return {"Authorization": f"Bearer {secret or self.site.credential}"}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """Serve a model and a run for each route; nothing may have gone wrong inside at the end."""
    home = ServerHome(tmp_path_factory.mktemp("home") / "server")
    home.create()
    store, blobs = Store.open(home.path), BlobStore(home.blobs)
    spec = register_model(store, blobs)
    for name in ROUTES:
        create_run(store, blobs, spec, name, rounds=1000, min_participants=1)
    operator = new_operator_secret()
    store.add_operator(OperatorRecord("machine", Role.ADMINISTER, 0.0, None), operator)
    wish = TokenWish(uses=1000)
    token = invite(store, home, ServerConfig(), wish, by="test", now=time.time()).token
    store.close()
    limits = {
        "max_enrolments_per_minute": "100000",
        "max_clients": "100000",
        "max_requests_per_s": "100000",
        "max_strange_requests_per_s": "100000",
    }
    with running_server(home.path, settings=limits) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        checks = schema.config.checks
        checks.negative_data_rejection.expected_statuses = REFUSALS
        checks.missing_required_header.expected_statuses = REFUSALS
        checks.positive_data_acceptance.expected_statuses = [
            "2xx", "3xx", "401", "403", "404", "409", "413", "416"
        ]  # fmt: skip
        yield Target(server, schema, spec, operator, token.token_id)
        log = server.log.read_text(encoding="utf-8")
        assert "ERROR" not in log
        assert "Traceback" not in log


@pytest.fixture
def participant(target: Target, request: pytest.FixtureRequest) -> Iterator[Participant]:
    """Enrol a client in the run of the route under test, up to an upload without bytes."""
    run = request.node.callspec.params["name"]
    with connection(target.server.url) as http:
        site = enrol(http, f"plant {run}", run)
        calibrate(site, target.spec)
        work = site.work(wait_s=20)
        upload = site.announce(honest_delta(target.spec, work))
        known = {
            "assignment_id": work.assignment_id,
            "model_id": target.spec.model_id,
            "run": run,
            "sha256": target.spec.head.weights.sha256,
            "upload_id": upload.upload_id,
            "client_id": site.client_id,
            "token_id": target.token_id,
        }
        yield Participant(site, target.operator, known)


def use_known_names(case: Case[Any], known: dict[str, str]) -> None:
    """Speak of things that are there: drawn names alone never get past the first look-up."""
    for part in case.path_parameters or {}:
        case.path_parameters[part] = known.get(part, case.path_parameters[part])
    if isinstance(case.body, dict):
        there = case.body.keys() & (known.keys() - {"sha256"})
        case.body.update({name: known[name] for name in there})


def poll_briefly(case: Case[Any]) -> None:
    wait_s = (case.query or {}).get("wait_s")
    if isinstance(wait_s, int | float):
        case.query["wait_s"] = min(wait_s, LONGEST_POLL_S)


def attack(
    route: Route, operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode, by: Participant
) -> None:
    """Make many calls of an operation and hold every answer against the document."""
    is_right = mode is GenerationMode.POSITIVE
    excluded = [] if is_right else [ignored_auth]  # a wrong protocol is told first
    if is_right and route in RULES_BEYOND_A_SCHEMA:
        excluded.append(positive_data_acceptance)

    @SETTINGS
    @given(operation.as_strategy(generation_mode=mode))
    def call(case: Case[Any]) -> None:
        poll_briefly(case)
        if is_right:
            use_known_names(case, by.known)
        is_told = is_right or "authorization" in {name.lower() for name in case.headers or ()}
        headers = by.authorization(route) if is_told else {}  # else leaving it out is what is wrong
        response = case.call(headers=headers, timeout=30)
        case.validate_response(response, headers=headers, excluded_checks=excluded)

    call()


@pytest.mark.parametrize("name", ROUTES)
def test_no_call_is_answered_otherwise_than_documented(
    target: Target, participant: Participant, name: str
) -> None:
    route = ROUTES[name]
    operation = target.schema[route.path][route.method]
    attack(route, operation, GenerationMode.POSITIVE, participant)
    if route not in WITHOUT_PARAMETERS:
        attack(route, operation, GenerationMode.NEGATIVE, participant)


def test_the_server_answers_as_before_after_all_that(target: Target) -> None:
    with connection(target.server.url) as http:
        assert http.get(routes.READY.path).json()["status"] == "ok"
