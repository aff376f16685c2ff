"""Transfers may take any time as long as they move, in bounded pieces, digested as they come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from fedra_edge.api import ServerApi
from fedra_edge.batching import begin_together
from fedra_edge.errors import ServerUnreachableError
from fedra_edge.layer_cache import LayerCache
from fedra_edge.link import Link
from fedra_edge.metering import BoardMeter, OnBytes
from fedra_edge.progress import ClientProgress, Phase, ProgressBoard
from fedra_edge.protocol import routes
from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.digests import format_digest
from fedra_edge.protocol.messages import DeltaReceipt, UploadStatus
from fedra_edge.protocol.models import BlobRef
from fedra_edge.retrying import ONCE, Retrier, RetryPolicy
from fedra_edge.transfers import APPEND_BYTES
from fedra_edge.transport import Transport, open_http_client
from tests.support.builders import make_training_report
from tests.support.link_proxy import Quality, bad_link
from tests.support.wire_server import Received, Reply, WireServer, scripted, serving

CONTENT = bytes(range(256)) * 600
REF = BlobRef(sha256=sha256(CONTENT).hexdigest(), size_bytes=len(CONTENT))
IMPATIENT = Link(idle_s=1.0)
SLOW = Quality(bits_per_s=400_000)
"""Three seconds for the content."""


@contextmanager
def connected(url: str, link: Link = IMPATIENT, policy: RetryPolicy = ONCE) -> Iterator[ServerApi]:
    transport = Transport(open_http_client(url, link), link)
    try:
        yield ServerApi(transport, Retrier(threading.Event()), policy)
    finally:
        transport.close()


def manifest_of(content: bytes) -> DeltaManifest:
    return DeltaManifest(
        assignment_id="a1",
        sha256=sha256(content).hexdigest(),
        size_bytes=len(content),
        num_examples=1,
        report=make_training_report(),
    )


class Depot:
    """Takes uploads as the protocol says; ``hold_s`` is how long it checks a complete one.

    Of the first that comes whole only the bytes before ``drops_at`` are taken, if that is set.
    """

    def __init__(self) -> None:
        self.held = b""
        self.size_bytes = 0
        self.hold_s = 0.0
        self.drops_at = 0

    def __call__(self, received: Received) -> Reply:
        if received.path == routes.UPLOAD_WHOLE.path:
            return self.take_whole(received)
        if received.method == "POST":
            self.size_bytes = DeltaManifest.model_validate_json(received.body).size_bytes
            held = len(self.held)
            status = UploadStatus(upload_id="u1", offset_bytes=held, size_bytes=self.size_bytes)
            return Reply.of(status, 201)
        assert received.headers[routes.UPLOAD_OFFSET_HEADER] == str(len(self.held))
        self.held += received.body
        if received.headers[routes.UPLOAD_COMPLETE_HEADER] == "?0":
            return Reply(204)
        threading.Event().wait(self.hold_s)
        return Reply.of(DeltaReceipt(assignment_id="a1"))

    def take_whole(self, received: Received) -> Reply:
        announced_bytes = int(received.headers[routes.MANIFEST_LENGTH_HEADER])
        told = DeltaManifest.model_validate_json(received.body[:announced_bytes])
        self.held = received.body[announced_bytes:]
        if self.drops_at:
            self.held, self.drops_at = self.held[: self.drops_at], 0
            return Reply(503)
        assert told == manifest_of(self.held)
        return Reply.of(DeltaReceipt(assignment_id="a1"))


def port_of(server: WireServer) -> int:
    return int(server.url.rpartition(":")[2])


def test_a_slow_download_is_no_silent_one(tmp_path: Path) -> None:
    with (
        serving(scripted(Reply(200, CONTENT))) as server,
        bad_link(port_of(server), SLOW) as link,
        connected(link.url) as api,
    ):
        assert api.download_blob(REF, tmp_path / "part") == REF.sha256
    assert len(server.received) == 1


def test_a_slow_upload_and_a_slow_check_are_no_silence(tmp_path: Path) -> None:
    file = tmp_path / "delta"
    file.write_bytes(CONTENT)
    depot = Depot()
    depot.hold_s = 2.0
    with (
        serving(depot) as server,
        bad_link(port_of(server), SLOW) as link,
        connected(link.url) as api,
    ):
        assert api.send_delta(manifest_of(CONTENT), file).assignment_id == "a1"
    assert [received.method for received in server.received] == ["POST", "PATCH"]


def test_a_silent_server_is_given_up(tmp_path: Path) -> None:
    released = threading.Event()

    def hold(_received: Received) -> Reply:
        released.wait(20)
        return Reply(200, CONTENT)

    with serving(hold) as server, connected(server.url) as api:
        with pytest.raises(ServerUnreachableError, match="in time"):
            api.download_blob(REF, tmp_path / "part")
        released.set()


def test_a_large_delta_goes_in_pieces_that_are_acknowledged(tmp_path: Path) -> None:
    content = bytes(2 * APPEND_BYTES + 5)
    file = tmp_path / "delta"
    file.write_bytes(content)
    depot = Depot()
    with serving(depot) as server, connected(server.url, Link()) as api:
        api.send_delta(manifest_of(content), file)
    patches = [received for received in server.received if received.method == "PATCH"]
    assert [len(patch.body) for patch in patches] == [APPEND_BYTES, APPEND_BYTES, 5]
    told = {patch.headers[routes.DIGEST_HEADER] for patch in patches}
    assert told == {format_digest(sha256(content).hexdigest())}
    assert [patch.headers["Upload-Complete"] for patch in patches] == ["?0", "?0", "?1"]
    assert {patch.headers["Content-Type"] for patch in patches} == {"application/partial-upload"}


def test_a_new_small_delta_goes_in_one_request(tmp_path: Path) -> None:
    file = tmp_path / "delta"
    file.write_bytes(CONTENT)
    depot = Depot()
    with serving(depot) as server, connected(server.url) as api:
        api.send_delta(manifest_of(CONTENT), file, is_new=True)
    assert [received.path for received in server.received] == [routes.UPLOAD_WHOLE.path]
    assert depot.held == CONTENT


def test_what_a_cut_left_of_a_small_delta_is_not_sent_again(tmp_path: Path) -> None:
    file = tmp_path / "delta"
    file.write_bytes(CONTENT)
    depot = Depot()
    depot.drops_at = 100_000
    with serving(depot) as server, connected(server.url) as api:
        api.send_delta(manifest_of(CONTENT), file, is_new=True)
    whole, announced, rest = server.received
    assert (whole.path, announced.path) == (routes.UPLOAD_WHOLE.path, routes.UPLOAD_CREATE.path)
    assert rest.body == CONTENT[100_000:]
    assert depot.held == CONTENT


def test_a_large_delta_is_announced_first_however_new(tmp_path: Path) -> None:
    content = bytes(5 * 2**20)
    file = tmp_path / "delta"
    file.write_bytes(content)
    depot = Depot()
    with serving(depot) as server, connected(server.url) as api:
        api.send_delta(manifest_of(content), file, is_new=True)
    assert [received.method for received in server.received] == ["POST", "PATCH"]
    assert depot.held == content


def test_a_resumed_download_gives_the_digest_of_the_whole(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(CONTENT[:1000])
    rest = Reply(206, CONTENT[1000:], {"Content-Range": f"bytes 1000-{len(CONTENT) - 1}/*"})
    counted: list[int] = []
    with serving(scripted(rest)) as server, connected(server.url) as api:
        assert api.download_blob(REF, part, counted.append) == REF.sha256
    assert sum(counted) == len(CONTENT)


def test_damaged_bytes_give_another_digest(tmp_path: Path) -> None:
    with serving(scripted(Reply(200, bytes(len(CONTENT))))) as server, connected(server.url) as api:
        assert api.download_blob(REF, tmp_path / "part") != REF.sha256


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_long_transfer_is_shown_and_a_short_one_is_not() -> None:
    seen: list[ClientProgress] = []
    board, clock = ProgressBoard(seen.append), Hands()
    board.update(phase=Phase.DOWNLOADING, detail="fetching layers 1, 2")
    meter: OnBytes = BoardMeter(board, 100, clock)
    meter(10)
    assert len(seen) == 1
    clock.now = 2.5
    board.update(phase=Phase.CONNECTING, detail="no answer; trying again in 1 s")
    meter(20)
    shown = board.current
    assert (shown.phase, shown.detail) == (Phase.DOWNLOADING, "fetching layers 1, 2")
    assert (shown.transfer_bytes_done, shown.transfer_bytes_total) == (30, 100)
    board.update(phase=Phase.TRAINING)
    assert board.current.transfer_bytes_total == 0


def test_a_listener_is_told_by_one_thread_at_a_time() -> None:
    busy, overlaps = threading.Lock(), []

    def listen(_progress: ClientProgress) -> None:
        overlaps.append(not busy.acquire(blocking=False))
        threading.Event().wait(0.001)
        busy.release()
        overlaps.append(not board.is_telling)

    board = ProgressBoard(listen)
    clock = Hands()
    meters = [BoardMeter(board, 100, clock) for _ in range(20)]
    clock.now = 10.0
    threads = [threading.Thread(target=meter, args=(n,)) for n, meter in enumerate(meters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps
    assert not any(overlaps)
    assert not board.is_telling


def test_small_files_come_together_and_a_cut_one_goes_on(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(4)]
    refs = [BlobRef(sha256=sha256(it).hexdigest(), size_bytes=len(it)) for it in contents]

    def serve(received: Received) -> Reply:
        if received.path.startswith(f"{routes.BLOBS.path}?"):
            return Reply(200, b"".join(contents), cut_after=250_000)
        content = contents[[ref.sha256 for ref in refs].index(received.path[-64:])]
        start = int(received.headers.get("Range", "bytes=0-")[6:-1])
        told = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return Reply(206 if start else 200, content[start:], told)

    counted: list[int] = []
    with serving(serve) as server:
        transport = Transport(open_http_client(server.url))
        api = ServerApi(transport, Retrier(threading.Event()), ONCE)
        begin = partial(begin_together, transport)
        cache = LayerCache(
            tmp_path / "blobs", 10**9, api.download_blob, lambda _total: counted.append, begin
        )
        cache.fetch_all(refs)
        assert [cache.path(ref).read_bytes() for ref in refs] == contents
        assert transport.traffic.bytes_received == 400_000
        transport.close()
    assert sum(counted) == 400_000
    assert sorted(str(it.headers.get("Range")) for it in server.received) == [
        "None",
        "None",
        "bytes=50000-",
    ]
