"""Every problem code can be met over HTTP, and tells what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.messages import FailureReport
from fedra_edge.protocol.problems import PROBLEM_MEDIA_TYPE, Problem, ProblemCode
from fedra_edge.protocol.rounds import Evaluation
from fedra_edge.protocol.slices import SliceManifest
from fedra_edge.protocol.tensors import FloatArray, serialize_tensors
from fedra_edge.protocol.version import PROTOCOL_HEADER, PROTOCOL_VERSION
from fedra_server.config import ServerConfig
from fedra_server.http.problems import ANSWERS
from fedra_server.roles import OperatorRecord, Role
from fedra_server.runs import RunState
from fedra_server.storage.operators import new_operator_secret
from tests.contract.conftest import Participants
from tests.support.headquarters import (
    Delta,
    Headquarters,
    Site,
    delta_tensors,
    headquarters,
    home_in,
)
from tests.support.keys import SiteKey, authority_of


class Scene(NamedTuple):
    """A participant with its work, another one, and the server."""

    hq: Headquarters
    site: Site
    work: SliceManifest
    other: Site

    def send_tensors(self, change: Callable[[dict[str, FloatArray]], object]) -> httpx.Response:
        tensors = delta_tensors(self.hq.spec, self.work)
        change(tensors)
        return self.site.send(Delta.of(serialize_tensors(tensors), self.work.assignment_id))


def malformed(scene: Scene) -> httpx.Response:
    return scene.site.call(routes.EVALUATION, content=b'{"run": ')


def not_authenticated(scene: Scene) -> httpx.Response:
    return scene.site.call(routes.CLIENT_STATUS, headers={"Authorization": "Bearer wrong"})


def not_permitted(scene: Scene) -> httpx.Response:
    parts = {"assignment_id": scene.work.assignment_id}
    return scene.other.call(routes.FAILURE, FailureReport(detail="not mine"), parts=parts)


def not_found(scene: Scene) -> httpx.Response:
    parts = {"assignment_id": "nowhere"}
    return scene.site.call(routes.FAILURE, FailureReport(detail="none"), parts=parts)


def method_not_allowed(scene: Scene) -> httpx.Response:
    return scene.site.http.delete("/v1/evaluations")


def protocol_mismatch(scene: Scene) -> httpx.Response:
    return scene.site.call(routes.CLIENT_STATUS, headers={PROTOCOL_HEADER: "3.0"})


def request_too_large(scene: Scene) -> httpx.Response:
    return scene.site.call(routes.EVALUATION, content=b" " * 200_000)


def range_not_satisfiable(scene: Scene) -> httpx.Response:
    sha256 = scene.work.revision.head.sha256
    return scene.site.call(
        routes.BLOB, parts={"sha256": sha256}, headers={"Range": "bytes=99999999-"}
    )


def round_closed(scene: Scene) -> httpx.Response:
    upload = scene.site.announce(scene.hq.delta(scene.work))
    scene.hq.set_state(scene.work.run, RunState.STOPPED)
    return scene.site.append(upload.upload_id, b"late")


def delta_conflict(scene: Scene) -> httpx.Response:
    assert scene.site.send(scene.hq.delta(scene.work)).status_code == 200
    other = Delta.of(b"another", scene.work.assignment_id)
    return scene.site.call(routes.UPLOAD_CREATE, other.manifest)


def delta_too_large(scene: Scene) -> httpx.Response:
    honest = scene.hq.delta(scene.work).manifest
    return scene.site.call(routes.UPLOAD_CREATE, honest.model_copy(update={"size_bytes": 2**30}))


def offset_mismatch(scene: Scene) -> httpx.Response:
    upload = scene.site.announce(scene.hq.delta(scene.work))
    return scene.site.append(upload.upload_id, b"too far", offset=5)


def digest_mismatch(scene: Scene) -> httpx.Response:
    delta = scene.hq.delta(scene.work)
    upload = scene.site.announce(delta)
    return scene.site.append(upload.upload_id, bytes(len(delta.data)))


def tensors_malformed(scene: Scene) -> httpx.Response:
    return scene.site.send(Delta.of(b"no safetensors file at all", scene.work.assignment_id))


def tensor_missing(scene: Scene) -> httpx.Response:
    return scene.send_tensors(lambda tensors: tensors.pop(min(tensors)))


def tensor_unexpected(scene: Scene) -> httpx.Response:
    return scene.send_tensors(lambda tensors: tensors.update({"stem/w": np.zeros(2, np.float32)}))


def tensor_shape(scene: Scene) -> httpx.Response:
    def transpose(tensors: dict[str, FloatArray]) -> None:
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
        tensors[name] = tensors[name].T

    return scene.send_tensors(transpose)


def tensor_dtype(scene: Scene) -> httpx.Response:
    halved = {
        name: tensor.astype(np.float16)
        for name, tensor in delta_tensors(scene.hq.spec, scene.work).items()
    }
    return scene.site.send(Delta.of(serialize_tensors(halved), scene.work.assignment_id))


def tensor_not_finite(scene: Scene) -> httpx.Response:
    return scene.send_tensors(lambda tensors: tensors[min(tensors)].fill(np.nan))


def join_token_invalid(scene: Scene) -> httpx.Response:
    ca_sha256 = authority_of(scene.other.http).ca_sha256
    request = SiteKey().enrolment(ca_sha256, join_secret="00000000-guessed")  # noqa: S106
    return scene.other.call(routes.ENROL, request)


def signature_invalid(scene: Scene) -> httpx.Response:
    return scene.other.call(routes.ENROL, SiteKey().enrolment("0" * 64))


def challenge_invalid(scene: Scene) -> httpx.Response:
    ca_sha256 = authority_of(scene.other.http).ca_sha256
    request = SiteKey().session_request(ca_sha256, scene.other.client_id, "1.2.3")
    return scene.other.call(routes.SESSION, request)


def client_revoked(scene: Scene) -> httpx.Response:
    with scene.hq.site("revoked", calibrated=False) as site:
        site.call(routes.LEAVE)
        return site.call(routes.CLIENT_STATUS)


def as_operator(scene: Scene, role: Role, route: routes.Route, **parts: str) -> httpx.Response:
    secret = new_operator_secret()
    record = OperatorRecord(secret[:20], role, 0.0, None)
    scene.hq.services.store.add_operator(record, secret)
    headers = {"Authorization": f"Bearer {secret}"}
    return httpx.request(route.method, f"{scene.hq.url}{route.fill(**parts)}", headers=headers)


def role_insufficient(scene: Scene) -> httpx.Response:
    return as_operator(scene, Role.SCRAPE, routes.OPERATOR_RUNS)


def state_conflict(scene: Scene) -> httpx.Response:
    run = scene.hq.services.store.assignment(AssignmentId(scene.work.assignment_id)).run
    return as_operator(scene, Role.OPERATE, routes.OPERATOR_STEER, run=run, step="start")


PROVOKED = {
    ProblemCode(function.__name__.replace("_", "-")): function
    for function in (
        not_authenticated, not_permitted, not_found, method_not_allowed, protocol_mismatch,
        request_too_large, range_not_satisfiable, round_closed, delta_conflict, delta_too_large,
        offset_mismatch, digest_mismatch, tensors_malformed, tensor_missing, tensor_unexpected,
        tensor_shape, tensor_dtype, tensor_not_finite,
        join_token_invalid, signature_invalid, challenge_invalid, client_revoked,
        role_insufficient, state_conflict,
    )
} | {ProblemCode.MALFORMED_REQUEST: malformed}  # fmt: skip


BY_THE_HOSTILE = {
    ProblemCode.HTTP_MALFORMED, ProblemCode.HEAD_TOO_LARGE, ProblemCode.LENGTH_AMBIGUOUS,
    ProblemCode.HOST_MALFORMED, ProblemCode.PATH_MALFORMED, ProblemCode.EXPECTATION_FAILED,
    ProblemCode.ENCODING_UNSUPPORTED, ProblemCode.CONTENT_TYPE_UNSUPPORTED,
    ProblemCode.BODY_TOO_SLOW, ProblemCode.REPEATED_NAME, ProblemCode.TOO_MANY_REQUESTS,
    ProblemCode.TOO_MANY_UPLOADS, ProblemCode.TRANSFER_EXHAUSTED, ProblemCode.NOT_ASSIGNED,
    ProblemCode.NUM_EXAMPLES_IMPLAUSIBLE,
}  # fmt: skip
"""Met in the tests named test_hostile_*."""


@pytest.fixture
def scene(hq: Headquarters, participants: Participants) -> Scene:
    (site, work), (other, _) = participants()
    return Scene(hq, site, work, other)


def check_problem(answer: httpx.Response, code: ProblemCode) -> Problem:
    assert answer.headers["Content-Type"] == PROBLEM_MEDIA_TYPE
    assert answer.headers[PROTOCOL_HEADER] == PROTOCOL_VERSION
    problem = Problem.model_validate_json(answer.content)
    assert problem.code is code, problem
    assert problem.status == answer.status_code == ANSWERS[code].status
    assert problem.detail
    assert problem.remedy.endswith(".")
    return problem


@pytest.mark.parametrize("code", sorted(PROVOKED))
def test_a_problem_is_met_and_explained(scene: Scene, code: ProblemCode) -> None:
    check_problem(PROVOKED[code](scene), code)
    assert scene.other.call(routes.CLIENT_STATUS).status_code == 200


@contextmanager
def refused_for_space(home: Path, free_bytes: Callable[[Path], int]) -> Iterator[httpx.Response]:
    """Announce a delta to a server whose disk is as ``free_bytes`` says."""
    with (
        headquarters(home_in(home), ServerConfig(), free_bytes) as hq,
        hq.run("run", min_participants=1),
        hq.site("plant", "run") as site,
    ):
        yield site.call(routes.UPLOAD_CREATE, hq.delta(site.work()).manifest)


def test_a_full_disk_is_told_before_a_byte_is_sent(tmp_path: Path) -> None:
    with refused_for_space(tmp_path, lambda _: 0) as answer:
        check_problem(answer, ProblemCode.STORAGE_FULL)


def test_an_unexpected_error_leaks_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_directory: Path) -> int:
        raise RuntimeError("secret")

    with refused_for_space(tmp_path, broken) as answer:  # its connection is used once more
        check_problem(answer, ProblemCode.INTERNAL)
    [told] = [it for it in caplog.records if it.name == "fedra_server.http.problems"]
    assert told.exc_info is not None
    assert "secret" not in answer.text
    assert "RuntimeError" not in answer.text


def test_no_code_is_left_out() -> None:
    assert set(ANSWERS) == set(ProblemCode)
    elsewhere = BY_THE_HOSTILE | {ProblemCode.STORAGE_FULL, ProblemCode.INTERNAL}
    assert set(PROVOKED) | elsewhere == set(ProblemCode)


def test_a_wrong_protocol_is_told_before_a_wrong_credential(scene: Scene) -> None:
    headers = {PROTOCOL_HEADER: "0.9", "Authorization": "Bearer wrong"}
    answer = scene.site.call(routes.CLIENT_STATUS, headers=headers)
    check_problem(answer, ProblemCode.PROTOCOL_MISMATCH)


def test_a_missing_protocol_or_credential_is_told(scene: Scene) -> None:
    url = f"{scene.hq.url}/v1/clients/me"
    check_problem(httpx.get(url), ProblemCode.PROTOCOL_MISMATCH)
    answer = httpx.get(url, headers={PROTOCOL_HEADER: "2.9"})
    check_problem(answer, ProblemCode.NOT_AUTHENTICATED)
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xfe", b"[]", b"null", b'{"run": 1}', b"[" * 50_000, b'{"a":' + b"1" * 5000 + b"}"],
)
def test_rubbish_is_refused_as_malformed(scene: Scene, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = scene.site.call(routes.EVALUATION, content=body, headers=headers)
    check_problem(answer, ProblemCode.MALFORMED_REQUEST)


def test_a_body_of_unknown_length_is_cut_at_the_limit(scene: Scene) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 10_000

    answer = scene.site.call(routes.EVALUATION, content=endless())
    check_problem(answer, ProblemCode.REQUEST_TOO_LARGE)


def test_more_correct_than_examples_is_malformed(scene: Scene) -> None:
    right = Evaluation(run=scene.work.run, revision=0, num_examples=1, num_correct=1, loss_sum=0.5)
    wrong = right.model_copy(update={"num_correct": 2})
    answer = scene.site.call(routes.EVALUATION, wrong)
    assert "num_correct" in check_problem(answer, ProblemCode.MALFORMED_REQUEST).detail


def test_a_misspelt_run_is_told_at_enrolment(scene: Scene) -> None:
    request = SiteKey().enrolment(authority_of(scene.site.http).ca_sha256, run="misspelt")
    problem = check_problem(scene.site.call(routes.ENROL, request), ProblemCode.NOT_FOUND)
    assert "--run" in problem.remedy


def test_a_client_bound_to_a_run_reports_to_no_other(scene: Scene) -> None:
    evaluation = Evaluation(run="other", revision=0, num_examples=1, num_correct=1, loss_sum=0.5)
    answer = scene.site.call(routes.EVALUATION, evaluation)
    check_problem(answer, ProblemCode.NOT_PERMITTED)


def test_a_wrong_method_names_the_right_ones(scene: Scene) -> None:
    assert method_not_allowed(scene).headers["Allow"] == "POST"
