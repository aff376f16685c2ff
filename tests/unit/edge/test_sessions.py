"""Sessions are made with the key, renewed once for all who need one, and end with a reason."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedra_edge.api import ServerApi
from fedra_edge.errors import (
    ChallengeRefusedError,
    ClientRevokedError,
    IdentityError,
    NotAuthenticatedError,
    SignatureRefusedError,
)
from fedra_edge.identity import Identity
from fedra_edge.keys import KeyFiles
from fedra_edge.metering import unwatched
from fedra_edge.protocol import routes
from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.messages import DeltaReceipt, UploadStatus
from fedra_edge.protocol.models import BlobRef
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.rounds import Wait
from fedra_edge.retrying import ONCE, Retrier
from fedra_edge.sessions import GivenSession, KeySessions
from fedra_edge.transfers import APPEND_BYTES
from fedra_edge.transport import Request, Transport, open_http_client
from tests.support.builders import make_training_report
from tests.support.gate import CLIENT_ID, Gate
from tests.support.wire_server import Received, Reply, serving

ASK = Request(routes.CLIENT_STATUS, routes.CLIENT_STATUS.path)


@contextmanager
def member(gate: Gate, home: Path) -> Iterator[tuple[Transport, KeySessions]]:
    """Be the member that a gate knows."""
    keys = KeyFiles(home)
    gate.public_key = keys.current().public_key
    with serving(gate) as server:
        transport = Transport(open_http_client(server.url))
        identity = Identity(ClientId(CLIENT_ID), gate.authority.ca_sha256)
        sessions = KeySessions(transport, keys, identity)
        transport.authenticate(sessions)
        try:
            yield transport, sessions
        finally:
            transport.close()


def api_of(transport: Transport) -> ServerApi:
    return ServerApi(transport, Retrier(threading.Event()), ONCE)


def test_a_session_is_made_when_it_is_needed_and_used_again(tmp_path: Path) -> None:
    gate = Gate()
    with member(gate, tmp_path) as (transport, sessions):
        assert sessions.latest is None
        transport.send(ASK)
        transport.send(ASK)
        assert gate.sessions_made == 1
        assert sessions.latest == "session-1"


def test_what_a_restarted_server_forgot_is_made_anew(tmp_path: Path) -> None:
    gate = Gate()
    with member(gate, tmp_path) as (transport, _):
        for made in (1, 2, 3):
            transport.send(ASK)
            assert gate.sessions_made == made
            gate.forget_sessions()


def test_many_threads_share_one_renewal(tmp_path: Path) -> None:
    together = threading.Barrier(8)
    gate = Gate()
    with member(gate, tmp_path) as (transport, _):
        transport.send(ASK)
        gate.forget_sessions()
        failed: list[Exception] = []

        def ask() -> None:
            together.wait(30)
            try:
                for _ in range(5):
                    transport.send(ASK)
            except Exception as error:  # noqa: BLE001 (told to the test)
                failed.append(error)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
    assert gate.sessions_made == 2


def test_a_server_that_takes_no_session_is_asked_twice_and_no_more(tmp_path: Path) -> None:
    asked: list[str] = []

    def refuse(received: Received) -> Reply:
        asked.append(received.headers["Authorization"])
        return Reply.problem(ProblemCode.NOT_AUTHENTICATED, 401)

    gate = Gate(behind=refuse)
    with member(gate, tmp_path) as (transport, _), pytest.raises(NotAuthenticatedError):
        transport.send(ASK)
    assert asked == ["Bearer session-1", "Bearer session-2"]


def test_a_session_that_was_handed_over_is_never_renewed(tmp_path: Path) -> None:
    gate = Gate()
    with member(gate, tmp_path) as (transport, _):
        transport.authenticate(GivenSession("an old one"))
        with pytest.raises(NotAuthenticatedError):
            transport.send(ASK)
    assert gate.sessions_made == 0


def test_a_challenge_of_the_server_before_its_restart_is_replaced(tmp_path: Path) -> None:
    gate = Gate(refusals=[ProblemCode.CHALLENGE_INVALID] * 2)
    with member(gate, tmp_path) as (transport, _):
        transport.send(ASK)
        gate.forget_sessions()
        gate.refusals = [ProblemCode.CHALLENGE_INVALID] * 9
        with pytest.raises(ChallengeRefusedError):
            transport.send(ASK)
    assert len(gate.refusals) == 6


def test_after_a_crash_whichever_key_the_server_knows_is_found(tmp_path: Path) -> None:
    gate, keys = Gate(), KeyFiles(tmp_path)
    with member(gate, tmp_path) as (transport, sessions):
        current, following = keys.current(), keys.next()
        transport.send(ASK)  # the server never heard of the next one
        assert keys.candidates() == [following, current]
        gate.public_key = following.public_key
        gate.forget_sessions()
        transport.send(ASK)  # the client never heard that the server took it
        assert keys.candidates() == [following]
        assert sessions.latest == "session-2"


def test_a_key_that_the_server_does_not_know_says_how_to_come_back(tmp_path: Path) -> None:
    gate = Gate()
    with member(gate, tmp_path) as (transport, _):
        gate.public_key = KeyFiles(tmp_path / "elsewhere").current().public_key
        with pytest.raises(SignatureRefusedError) as refusal:
            transport.send(ASK)
    assert f"token create --client {CLIENT_ID}" in refusal.value.remedy
    assert "leave --forget" in refusal.value.remedy


def test_a_key_that_is_gone_says_how_to_come_back(tmp_path: Path) -> None:
    with member(Gate(), tmp_path) as (transport, _):
        KeyFiles(tmp_path).forget()
        with pytest.raises(IdentityError) as failure:
            transport.send(ASK)
    assert "token create" in failure.value.remedy


@pytest.mark.parametrize("has_session", [False, True])
def test_a_revoked_client_hears_it_at_once(tmp_path: Path, has_session: bool) -> None:
    gate = Gate()
    with member(gate, tmp_path) as (transport, _):
        if has_session:
            transport.send(ASK)
        gate.is_revoked = True
        with pytest.raises(ClientRevokedError):
            transport.send(ASK)


def forgetting(gate: Gate, behind: Callable[[Received], Reply], forgets: list[bool]) -> None:
    """Let the gate forget all sessions after each answer that the list says so of."""

    def answer(received: Received) -> Reply:
        reply = behind(received)
        if forgets and forgets.pop(0):
            gate.forget_sessions()
        return reply

    gate.behind = answer


def test_an_upload_whose_session_ends_goes_on_at_its_offset(tmp_path: Path) -> None:
    data = bytes(range(256)) * (APPEND_BYTES // 128)  # two requests of the largest size
    file = tmp_path / "delta"
    file.write_bytes(data)
    manifest = DeltaManifest(
        assignment_id="a1", sha256="cd" * 32, size_bytes=len(data), num_examples=1,
        report=make_training_report(),
    )  # fmt: skip
    arrived = bytearray()

    def take(received: Received) -> Reply:
        if received.method == "POST":
            offset = len(arrived)
            return Reply.of(
                UploadStatus(upload_id="u1", offset_bytes=offset, size_bytes=len(data)), 201
            )
        assert int(received.headers[routes.UPLOAD_OFFSET_HEADER]) == len(arrived)
        arrived.extend(received.body)
        if received.headers[routes.UPLOAD_COMPLETE_HEADER] == "?0":
            return Reply(204)
        return Reply.of(DeltaReceipt(assignment_id="a1"))

    gate = Gate()
    forgetting(gate, take, [True, True])
    with member(gate, tmp_path / "home") as (transport, _):
        api_of(transport).send_delta(manifest, file)
    assert bytes(arrived) == data
    assert gate.sessions_made == 3


def test_a_download_whose_session_ends_goes_on_behind_what_came(tmp_path: Path) -> None:
    data = bytes(range(256)) * 400
    ref = BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    ranges: list[str | None] = []

    def give(received: Received) -> Reply:
        ranges.append(received.headers.get("Range"))
        if received.headers.get("Range") is None:
            return Reply(200, data, cut_after=50_000)
        start = int(received.headers["Range"].removeprefix("bytes=").rstrip("-"))
        told = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        return Reply(206, data[start:], told)

    gate = Gate()
    forgetting(gate, give, [True])
    with member(gate, tmp_path / "home") as (transport, _):
        digest = api_of(transport).download_blob(ref, tmp_path / "part", unwatched)
    assert digest == ref.sha256
    assert (tmp_path / "part").read_bytes() == data
    assert len(ranges) == 2
    assert gate.sessions_made == 2


def test_a_poll_whose_session_ended_is_asked_again(tmp_path: Path) -> None:
    gate = Gate()
    forgetting(gate, lambda _: Reply.of(Wait(reason="nothing to do")), [True, False])
    with member(gate, tmp_path) as (transport, _):
        for _ in range(2):
            assert isinstance(api_of(transport).assignment(0.0), Wait)
    assert gate.sessions_made == 2
