"""Every failure of the network becomes one of our errors, and what was cut is gone on with."""

from __future__ import annotations

import contextlib
import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from fedra_edge.api import ServerApi
from fedra_edge.errors import (
    REFUSALS,
    DeltaRefusedError,
    FedraEdgeError,
    NotAuthenticatedError,
    OffsetMismatchError,
    ProtocolMismatchError,
    RoundClosedError,
    ServerRefusedError,
    ServerUnreachableError,
    UnexpectedAnswerError,
    WorkInterrupted,
)
from fedra_edge.protocol import routes
from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.ids import AssignmentId, ModelId, UploadId
from fedra_edge.protocol.messages import DeltaReceipt, Health, Heartbeat, UploadStatus
from fedra_edge.protocol.models import BlobRef
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.rounds import Wait
from fedra_edge.protocol.trust import Authority
from fedra_edge.protocol.version import PROTOCOL_HEADER, PROTOCOL_VERSION
from fedra_edge.retrying import Retrier, RetryPolicy
from fedra_edge.sessions import GivenSession
from fedra_edge.transport import Request, Transport, open_http_client
from tests.support.builders import make_training_report
from tests.support.wire_server import Received, Reply, Script, scripted, serving, unused_port

QUICK = RetryPolicy(max_attempts=4, first_wait_s=0.01, max_wait_s=0.02)
HEALTHY = Reply.of(Health(status="ok", version="1", protocol=PROTOCOL_VERSION))


@contextmanager
def connected(
    url: str,
    policy: RetryPolicy = QUICK,
    stop: threading.Event | None = None,
    on_retry: Callable[[ServerUnreachableError, float], None] | None = None,
) -> Iterator[tuple[ServerApi, Transport]]:
    transport = Transport(open_http_client(url))
    try:
        yield ServerApi(transport, Retrier(stop or threading.Event(), on_retry), policy), transport
    finally:
        transport.close()


def failure_of(script: Script) -> FedraEdgeError:
    with serving(script) as server, connected(server.url, RetryPolicy(max_attempts=1)) as (api, _):
        try:
            api.health()
        except FedraEdgeError as failure:
            return failure
    pytest.fail("nothing was raised")


def test_a_request_carries_protocol_and_session() -> None:
    with serving(scripted(HEALTHY)) as server, connected(server.url) as (api, transport):
        api.health()
        transport.authenticate(GivenSession("secret"))
        api.health()
        transport.ask(Request(routes.CLIENT_STATUS, routes.CLIENT_STATUS.path), Health)
    *anonymous, last = server.received
    assert last.headers[PROTOCOL_HEADER] == PROTOCOL_VERSION
    assert len(anonymous) == 2
    assert all("Authorization" not in received.headers for received in anonymous)
    assert last.headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("code", list(ProblemCode))
def test_every_problem_code_has_its_error(code: ProblemCode) -> None:
    failure = failure_of(scripted(Reply.problem(code, 409)))
    assert type(failure) is REFUSALS[code]
    assert isinstance(failure, ServerRefusedError)
    assert failure.problem.code == code
    assert str(code) in str(failure)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ProblemCode.NOT_AUTHENTICATED, NotAuthenticatedError),
        (ProblemCode.ROUND_CLOSED, RoundClosedError),
        (ProblemCode.TENSOR_NOT_FINITE, DeltaRefusedError),
        (ProblemCode.PROTOCOL_MISMATCH, ProtocolMismatchError),
    ],
)
def test_the_codes_that_matter_most(code: ProblemCode, kind: type[Exception]) -> None:
    assert REFUSALS[code] is kind


def test_a_client_that_is_unknown_is_told_how_to_leave() -> None:
    failure = failure_of(scripted(Reply.problem(ProblemCode.NOT_AUTHENTICATED, 401)))
    assert "fedra-edge leave" in failure.remedy


def test_an_offset_mismatch_tells_the_offset() -> None:
    reply = Reply.problem(ProblemCode.OFFSET_MISMATCH, 409, Upload_Offset="77")
    failure = failure_of(scripted(reply))
    assert isinstance(failure, OffsetMismatchError)
    assert failure.offset_bytes == 77


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, b"<html>please log in</html>", {"Content-Type": "text/html"}),
        Reply(200, b'{"half": '),
        Reply(302, headers={"Location": "http://portal.example/"}),
        Reply(404, b"<html>nginx</html>", {"Content-Type": "text/html"}),
        Reply(403, b"{}", {"Content-Type": "application/json"}),
    ],
)
def test_what_is_no_fedra_server_is_recognised(reply: Reply) -> None:
    failure = failure_of(scripted(reply))
    assert isinstance(failure, UnexpectedAnswerError)
    assert failure.remedy


def test_a_server_of_another_protocol_is_refused() -> None:
    reply = Reply(200, HEALTHY.body, {PROTOCOL_HEADER: "3.0"})
    assert isinstance(failure_of(scripted(reply)), ProtocolMismatchError)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504, 507])
def test_not_now_is_tried_again(status: int) -> None:
    waits: list[float] = []
    script = scripted(Reply(status), Reply(status), HEALTHY)
    with (
        serving(script) as server,
        connected(server.url, on_retry=lambda _e, s: waits.append(s)) as (api, _),
    ):
        assert api.health().status == "ok"
    assert len(waits) == 2


def test_the_server_says_when_to_come_back() -> None:
    started = time.monotonic()
    script = scripted(Reply(503, headers={"Retry-After": "1"}), HEALTHY)
    with serving(script) as server, connected(server.url) as (api, _):
        api.health()
    assert time.monotonic() - started >= 1.0


def test_a_server_that_is_not_there_is_unreachable() -> None:
    with (
        connected(f"http://127.0.0.1:{unused_port()}") as (api, _),
        pytest.raises(ServerUnreachableError) as failure,
    ):
        api.health()
    assert failure.value.remedy


def test_a_cut_answer_is_asked_for_again() -> None:
    script = scripted(Reply(200, HEALTHY.body, cut_after=5), HEALTHY)
    with serving(script) as server, connected(server.url) as (api, _):
        assert api.health().status == "ok"


def test_a_stop_ends_a_wait_at_once() -> None:
    stop = threading.Event()
    policy = RetryPolicy(first_wait_s=60.0, max_wait_s=60.0)
    url = f"http://127.0.0.1:{unused_port()}"
    with connected(url, policy, stop, lambda _e, _s: stop.set()) as (api, _):
        started = time.monotonic()
        with pytest.raises(WorkInterrupted):
            api.health()
    assert time.monotonic() - started < 5


def test_a_stop_wakes_a_long_poll() -> None:
    stop, released = threading.Event(), threading.Event()
    asked = threading.Event()

    def hold(_received: Received) -> Reply:
        asked.set()
        released.wait(30)
        return Reply.of(Wait(reason="late"))

    with serving(hold) as server, connected(server.url, stop=stop) as (api, transport):

        def end() -> None:
            asked.wait(10)
            stop.set()
            transport.interrupt()

        ender = threading.Thread(target=end)
        ender.start()
        started = time.monotonic()
        with pytest.raises(WorkInterrupted):
            api.assignment(25.0)
        assert time.monotonic() - started < 10
        ender.join()
        released.set()
        server.script = scripted(Reply(204))
        transport.reopen()
        api.offline()


def test_a_heartbeat_is_sent_only_once() -> None:
    with (
        serving(scripted(Reply(503))) as server,
        connected(server.url) as (api, _),
        pytest.raises(ServerUnreachableError),
    ):
        api.heartbeat(Heartbeat(assignment_id="a", steps_done=1, steps_total=2))
    assert len(server.received) == 1


def test_a_model_that_is_not_the_one_asked_for_is_refused() -> None:
    with (
        serving(scripted(HEALTHY)) as server,
        connected(server.url) as (api, _),
        pytest.raises(UnexpectedAnswerError),
    ):
        api.model(ModelId("0" * 64))


def test_an_answer_without_end_is_given_up() -> None:
    endless = Reply(200, b" " * (65 * 2**20), {"Content-Type": "application/json"})
    with serving(scripted(endless)) as server:
        transport = Transport(open_http_client(server.url))
        with pytest.raises(UnexpectedAnswerError, match="by more than") as failure:
            transport.ask(Request(routes.READY, routes.READY.path), Health)
        assert transport.traffic.bytes_received < 65 * 2**20
        transport.close()
    assert failure.value.remedy


def test_whoever_is_asked_for_the_authority_sends_no_more_than_one_needs() -> None:
    padded = Reply(200, b" " * (65 * 2**10), {"Content-Type": "application/json"})
    with serving(scripted(padded)) as server, connected(server.url) as (api, transport):
        with pytest.raises(UnexpectedAnswerError, match="by more than 65536 bytes"):
            api.authority()
        assert transport.traffic.bytes_received <= 65 * 2**10


def test_an_answer_that_never_ends_takes_no_more_than_its_time() -> None:
    """A byte now and then is in time each, and one by one they would go on for days."""
    is_over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n")
                while not is_over.wait(0.05):
                    connection.sendall(b" ")

        dripping = threading.Thread(target=drip)
        dripping.start()
        transport = Transport(open_http_client(f"http://127.0.0.1:{listener.getsockname()[1]}"))
        try:
            with pytest.raises(ServerUnreachableError), transport.ending_after(0.5):
                transport.ask(Request(routes.AUTHORITY, routes.AUTHORITY.path), Authority)
        finally:
            is_over.set()
            dripping.join()
            transport.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
def test_a_compressed_answer_is_refused(encoding: str) -> None:
    bomb = Reply(200, gzip.compress(b" " * 2**20), {"Content-Encoding": encoding})
    failure = failure_of(scripted(bomb))
    assert isinstance(failure, UnexpectedAnswerError)
    assert "encoded as" in str(failure)


def test_no_compressed_answer_is_asked_for(tmp_path: Path) -> None:
    part = tmp_path / "blob.part"
    with serving(scripted(HEALTHY, Reply(200, CONTENT))) as server:
        with connected(server.url) as (api, _):
            api.health()
            api.download_blob(REF, part)
        assert [sent.headers["Accept-Encoding"] for sent in server.received] == ["identity"] * 2


CONTENT = bytes(range(256)) * 4000
REF = BlobRef(sha256=sha256(CONTENT).hexdigest(), size_bytes=len(CONTENT))


def serve_range(received: Received, cut_after: int | None = None) -> Reply:
    wanted = received.headers.get("Range")
    if wanted is None:
        return Reply(200, CONTENT, cut_after=cut_after)
    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
    headers = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
    return Reply(206, CONTENT[start:], headers, cut_after)


def test_a_download_that_is_cut_again_and_again_goes_on(tmp_path: Path) -> None:
    part = tmp_path / "blob.part"
    with (
        serving(lambda received: serve_range(received, cut_after=300_000)) as server,
        connected(server.url) as (api, transport),
    ):
        api.download_blob(REF, part)
        assert transport.traffic.bytes_received == len(CONTENT)
    assert part.read_bytes() == CONTENT
    assert len(server.received) == 4


def test_a_server_without_ranges_starts_over(tmp_path: Path) -> None:
    part = tmp_path / "blob.part"
    part.write_bytes(b"rubbish")
    with serving(scripted(Reply(200, CONTENT))) as server, connected(server.url) as (api, _):
        api.download_blob(REF, part)
    assert part.read_bytes() == CONTENT


def test_a_complete_part_asks_for_nothing(tmp_path: Path) -> None:
    part = tmp_path / "blob.part"
    part.write_bytes(CONTENT)
    with serving(scripted(Reply(500))) as server, connected(server.url) as (api, _):
        api.download_blob(REF, part)
    assert server.received == []


@pytest.mark.parametrize("content", [CONTENT + b"more", CONTENT[:-1], b""])
def test_another_size_than_named_is_no_download(tmp_path: Path, content: bytes) -> None:
    script = scripted(Reply(200, content))
    with (
        serving(script) as server,
        connected(server.url, RetryPolicy(2, 0.01)) as (api, _),
        pytest.raises(UnexpectedAnswerError),
    ):
        api.download_blob(REF, tmp_path / "blob.part")


def test_another_part_than_asked_for_is_refused(tmp_path: Path) -> None:
    part = tmp_path / "blob.part"
    part.write_bytes(CONTENT[:10])
    reply = Reply(206, CONTENT[5:], {"Content-Range": f"bytes 5-9/{len(CONTENT)}"})
    with (
        serving(scripted(reply)) as server,
        connected(server.url) as (api, _),
        pytest.raises(UnexpectedAnswerError, match="another part"),
    ):
        api.download_blob(REF, part)
    assert part.read_bytes() == CONTENT[:10]


class Depot:
    """Takes uploads as the protocol says; every PATCH is cut after some bytes, but the last."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held = b""

    def __call__(self, received: Received) -> Reply:
        """Answer a request."""
        if received.method == "POST":
            size_bytes = DeltaManifest.model_validate_json(received.body).size_bytes
            held = len(self.held)
            status = UploadStatus(upload_id="u1", offset_bytes=held, size_bytes=size_bytes)
            return Reply.of(status, 201)
        if received.method == "HEAD":
            return Reply(200, headers={routes.UPLOAD_OFFSET_HEADER: str(len(self.held))})
        offset = int(received.headers[routes.UPLOAD_OFFSET_HEADER])
        if offset != len(self.held):
            return Reply.problem(
                ProblemCode.OFFSET_MISMATCH, 409, Upload_Offset=str(len(self.held))
            )
        self.held += received.body[: self.limit_bytes]
        if len(received.body) > self.limit_bytes:
            return Reply(503)
        return Reply.of(DeltaReceipt(assignment_id="a1"))


def manifest_of(content: bytes) -> DeltaManifest:
    report = make_training_report()
    return DeltaManifest(
        assignment_id="a1",
        sha256=sha256(content).hexdigest(),
        size_bytes=len(content),
        num_examples=1,
        report=report,
    )


def test_an_upload_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "delta"
    file.write_bytes(CONTENT)
    depot = Depot(limit_bytes=400_000)
    with serving(depot) as server, connected(server.url) as (api, _):
        receipt = api.send_delta(manifest_of(CONTENT), file)
    assert receipt.assignment_id == AssignmentId("a1")
    assert depot.held == CONTENT
    patches = [received for received in server.received if received.method == "PATCH"]
    assert all(patch.headers[routes.UPLOAD_COMPLETE_HEADER] == "?1" for patch in patches)
    assert [len(patch.body) for patch in patches] == [1_024_000, 624_000, 224_000]


def test_a_complete_upload_is_committed_without_bytes(tmp_path: Path) -> None:
    file = tmp_path / "delta"
    file.write_bytes(CONTENT)
    depot = Depot(limit_bytes=2**30)
    depot.held = CONTENT
    with serving(depot) as server, connected(server.url) as (api, transport):
        api.send_delta(manifest_of(CONTENT), file)
        assert transport.traffic.bytes_sent < 1000
    assert server.received[-1].body == b""


def test_an_upload_that_another_request_holds_is_tried_later(tmp_path: Path) -> None:
    file = tmp_path / "delta"
    file.write_bytes(CONTENT)
    busy = Reply.problem(ProblemCode.OFFSET_MISMATCH, 409, Upload_Offset="3")
    begun = Reply.of(UploadStatus(upload_id="u1", offset_bytes=0, size_bytes=len(CONTENT)), 201)
    done = Reply.of(DeltaReceipt(assignment_id="a1"))
    with serving(scripted(begun, busy, begun, done)) as server, connected(server.url) as (api, _):
        assert api.send_delta(manifest_of(CONTENT), file).assignment_id == "a1"


def test_a_delta_damaged_on_its_way_is_sent_again(tmp_path: Path) -> None:
    file = tmp_path / "delta"
    file.write_bytes(CONTENT)
    begun = Reply.of(UploadStatus(upload_id="u1", offset_bytes=0, size_bytes=len(CONTENT)), 201)
    damaged = Reply.problem(ProblemCode.DIGEST_MISMATCH, 422)
    done = Reply.of(DeltaReceipt(assignment_id="a1"))
    script = scripted(begun, damaged, begun, done)
    with serving(script) as server, connected(server.url) as (api, _):
        assert api.send_delta(manifest_of(CONTENT), file).assignment_id == "a1"


def test_an_upload_tells_where_it_stands() -> None:
    depot = Depot(limit_bytes=1)
    depot.held = b"12345"
    with serving(depot) as server, connected(server.url) as (api, _):
        assert api.upload_offset(UploadId("u1")) == 5
        server.script = scripted(Reply(200))
        with pytest.raises(UnexpectedAnswerError, match="does not say"):
            api.upload_offset(UploadId("u1"))


def test_a_closed_round_is_told(tmp_path: Path) -> None:
    file = tmp_path / "delta"
    file.write_bytes(CONTENT)
    script = scripted(Reply.problem(ProblemCode.ROUND_CLOSED, 409))
    with (
        serving(script) as server,
        connected(server.url) as (api, _),
        pytest.raises(RoundClosedError),
    ):
        api.send_delta(manifest_of(CONTENT), file)
    assert len(server.received) == 1


def test_no_exception_of_the_http_library_escapes() -> None:
    foreign = [
        kind
        for kind in vars(httpx).values()
        if isinstance(kind, type) and issubclass(kind, httpx.RequestError)
    ]
    assert len(foreign) > 10
    request = httpx.Request("GET", "http://plant")
    for kind in foreign:

        def fail(_request: httpx.Request, kind: type[httpx.RequestError] = kind) -> httpx.Response:
            raise kind("broken", request=request)

        client = httpx.Client(base_url="http://plant", transport=httpx.MockTransport(fail))
        api = ServerApi(Transport(client), Retrier(threading.Event()), RetryPolicy(max_attempts=1))
        with pytest.raises(FedraEdgeError):
            api.health()
        client.close()


@pytest.mark.parametrize(
    ("body", "told", "advice"),
    [
        (b"Speak https:// here.\nMore.", "document: 'Speak https:// here.'", "try https://"),
        (b"no\x1b[2J\xff" + b"x" * 999, r"document: 'no\x1b[2J", "not of a proxy or portal"),
        (b"", "without a problem document", "not of a proxy or portal"),
    ],
)
def test_what_a_stranger_answers_is_quoted_and_obeyed_by_no_terminal(
    body: bytes, told: str, advice: str
) -> None:
    failure = failure_of(scripted(Reply(400, body, {"Content-Type": "text/plain"})))
    assert told in str(failure)
    assert str(failure).isprintable()
    assert len(str(failure)) < 300
    assert advice in failure.remedy
