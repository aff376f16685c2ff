"""Bytes down and up: ranges, validators, resumed uploads, and nobody else's data."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from fedra_edge.protocol import routes
from fedra_edge.protocol.digests import format_digest, parse_digest
from fedra_edge.protocol.ids import UploadId
from fedra_edge.protocol.messages import DeltaReceipt
from fedra_edge.protocol.slices import SliceManifest
from fedra_server.http.discarding import discard_dead_uploads
from fedra_server.runs import AssignmentState
from tests.contract.conftest import Participants
from tests.support.headquarters import Delta, Headquarters, Site, connection
from tests.support.offers import offer

DATA = bytes(range(256)) * 8192
SIZE = len(DATA)


@pytest.fixture(scope="module")
def sha256(hq: Headquarters) -> str:
    """The name of two megabytes that the server publishes."""
    [offered] = offer(hq, DATA)
    return offered


def get(site: Site, sha256: str, **headers: str) -> httpx.Response:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return site.call(routes.BLOB, parts={"sha256": sha256}, headers=sent)


def test_a_blob_comes_whole_and_for_ever(site: Site, sha256: str) -> None:
    answer = get(site, sha256)
    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["ETag"] == f'"{sha256}"'
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Length"] == str(SIZE)
    assert "immutable" in answer.headers["Cache-Control"]


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=1000000-", 1_000_000, SIZE - 1),
        ("bytes=-100", SIZE - 100, SIZE - 1),
        ("bytes=-99999999", 0, SIZE - 1),
        ("bytes=5-99999999", 5, SIZE - 1),
        ("bytes=1-1500000", 1, 1_500_000),
    ],
)
def test_a_range_comes_as_asked(
    site: Site, sha256: str, wanted: str, first: int, last: int
) -> None:
    answer = get(site, sha256, Range=wanted)
    assert (answer.status_code, answer.content) == (206, DATA[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
    assert answer.headers["Content-Length"] == str(last - first + 1)


@pytest.mark.parametrize(
    "wanted", ["bytes=9-5", "bytes=-", "bytes=0-1,4-5", "lines=1-2", "bytes=x"]
)
def test_a_range_without_meaning_is_ignored(site: Site, sha256: str, wanted: str) -> None:
    assert get(site, sha256, Range=wanted).status_code == 200


@pytest.mark.parametrize("wanted", [f"bytes={SIZE}-", "bytes=-0", "bytes=99999999-100000000"])
def test_a_range_beyond_the_end_is_refused(site: Site, sha256: str, wanted: str) -> None:
    answer = get(site, sha256, Range=wanted)
    assert answer.status_code == 416
    assert answer.headers["Content-Range"] == f"bytes */{SIZE}"


def test_what_the_caller_has_is_not_sent_again(site: Site, sha256: str) -> None:
    for known in (f'"{sha256}"', f'"x", W/"{sha256}"', "*"):
        answer = get(site, sha256, If_None_Match=known)
        assert (answer.status_code, answer.content) == (304, b"")
    assert get(site, sha256, If_None_Match='"x"').status_code == 200


def test_a_range_of_something_else_gives_the_whole(site: Site, sha256: str) -> None:
    assert get(site, sha256, Range="bytes=5-", If_Range=f'"{sha256}"').status_code == 206
    assert get(site, sha256, Range="bytes=5-", If_Range='"x"').status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "0" * 63,
        "A" * 64,
        "..",
        "%2e%2e%2f%2e%2e%2ffedra.sqlite3",
        "..%5c..%5cserver.toml",
        "0" * 64,
    ],
)
def test_no_name_reaches_another_file(hq: Headquarters, site: Site, name: str) -> None:
    answer = site.http.get(f"{hq.url}/v1/blobs/{name}")
    assert answer.status_code in {400, 403, 404, 422}
    codes = {"path-malformed", "not-assigned", "not-found", "malformed-request"}
    assert answer.json()["code"] in codes


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def offset_of(site: Site, upload_id: str) -> httpx.Response:
    return site.call(routes.UPLOAD_OFFSET, parts={"upload_id": upload_id})


def test_an_upload_is_resumed_byte_for_byte(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)
    assert (upload.offset_bytes, upload.size_bytes) == (0, len(delta.data))
    for start in (0, 100):
        data = delta.data[start : start + 100]
        answer = site.append(upload.upload_id, data, offset=start, complete=False)
        assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, str(start + 100))
    again = site.announce(delta)
    assert (again.upload_id, again.offset_bytes) == (upload.upload_id, 200)
    told = offset_of(site, upload.upload_id)
    assert (told.headers["Upload-Offset"], told.headers["Upload-Length"]) == (
        "200",
        str(len(delta.data)),
    )
    answer = site.append(upload.upload_id, delta.data[200:], offset=200)
    receipt = DeltaReceipt.model_validate_json(answer.content)
    assert (receipt.assignment_id, receipt.status) == (work.assignment_id, "admitted")
    assert hq.services.home.delta_file(work.id).read_bytes() == delta.data


def test_completing_twice_gives_the_same_receipt(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    receipt = site.send(delta)
    upload = site.announce(delta)
    assert upload.offset_bytes == len(delta.data)
    again = site.append(upload.upload_id, b"", offset=len(delta.data))
    assert (again.status_code, again.json()) == (200, receipt.json())


def test_a_wrong_offset_is_answered_with_the_right_one(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)
    site.append(upload.upload_id, delta.data[:50], complete=False)
    early = site.append(upload.upload_id, delta.data[:60], complete=False)
    assert (early.status_code, early.headers["Upload-Offset"]) == (409, "50")
    unfinished = site.append(upload.upload_id, delta.data[50:70], offset=50, complete=True)
    assert (unfinished.status_code, unfinished.headers["Upload-Offset"]) == (409, "70")
    assert site.append(upload.upload_id, delta.data[70:], offset=70).status_code == 200


@pytest.mark.parametrize("is_length_known", [True, False])
def test_more_bytes_than_announced_are_refused(
    hq: Headquarters, participant: tuple[Site, SliceManifest], is_length_known: bool
) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)
    data = delta.data + b"more"
    answer = site.append(upload.upload_id, data if is_length_known else iter([data]))
    assert (answer.status_code, answer.json()["code"]) == (413, "delta-too-large")
    assert offset_of(site, upload.upload_id).headers["Upload-Offset"] == "0"


def test_altered_bytes_may_be_sent_again(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)
    assert site.append(upload.upload_id, bytes(len(delta.data))).status_code == 422
    assert site.announce(delta).offset_bytes == 0
    assert site.append(upload.upload_id, delta.data).status_code == 200


def test_announcing_other_bytes_discards_the_first(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    upload = site.announce(Delta.of(b"first attempt", work.assignment_id))
    site.append(upload.upload_id, b"first", complete=False)
    assert site.send(hq.delta(work)).status_code == 200
    assert offset_of(site, upload.upload_id).status_code == 404
    assert not hq.services.home.upload_part(UploadId(upload.upload_id)).exists()


def test_an_upload_is_its_owners_alone(hq: Headquarters, participants: Participants) -> None:
    (site, work), (other, _) = participants()
    delta = hq.delta(work)
    upload = site.announce(delta)
    assert other.call(routes.UPLOAD_CREATE, delta.manifest).status_code == 403
    assert offset_of(other, upload.upload_id).status_code == 403
    assert other.append(upload.upload_id, b"", complete=False).status_code == 403
    assert offset_of(site, "unknown").status_code == 404


@pytest.mark.parametrize(
    "headers", [{}, {"Upload-Offset": "-1"}, {"Upload-Offset": "0", "Upload-Complete": "yes"}]
)
def test_unclear_headers_are_malformed(
    hq: Headquarters, participant: tuple[Site, SliceManifest], headers: dict[str, str]
) -> None:
    site, work = participant
    upload = site.announce(hq.delta(work))
    parts = {"upload_id": upload.upload_id}
    answer = site.call(routes.UPLOAD_APPEND, parts=parts, headers=headers, content=b"x")
    assert answer.status_code == 422


def test_a_sender_that_comes_back_takes_over_from_its_dead_connection(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)
    finish = threading.Event()
    answers: list[httpx.Response] = []

    def stalling() -> Iterator[bytes]:
        yield delta.data[:10]
        finish.wait(20)
        yield delta.data[10:]

    def send() -> None:
        with connection(hq.url, site.http.headers) as http:
            sender = Site(site.client_id, site.credential, http)
            answers.append(sender.append(upload.upload_id, stalling()))

    thread = threading.Thread(target=send)
    thread.start()
    wait_until(lambda: hq.services.receiving.is_held(work.id))
    wait_until(lambda: site.announce(delta).offset_bytes == 10)
    assert site.append(upload.upload_id, delta.data[10:], offset=10).status_code == 200
    finish.set()
    thread.join(20)
    assert [answer.status_code for answer in answers] == [409]
    assert hq.services.home.delta_file(work.id).read_bytes() == delta.data


@pytest.mark.parametrize("call", ["append", "offset"])
def test_every_call_about_an_upload_ends_the_one_before(
    hq: Headquarters, participant: tuple[Site, SliceManifest], call: str
) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)
    part = hq.services.home.upload_part(UploadId(upload.upload_id))
    finish = threading.Event()

    def stalling() -> Iterator[bytes]:
        yield delta.data[:10]
        finish.wait(20)

    def send() -> None:
        with (
            connection(hq.url, site.http.headers) as http,
            contextlib.suppress(httpx.HTTPError),
        ):
            sender = Site(site.client_id, site.credential, http)
            sender.append(upload.upload_id, stalling(), complete=False)

    thread = threading.Thread(target=send)
    thread.start()
    wait_until(lambda: hq.services.receiving.is_held(work.id))
    if call == "offset":
        wait_until(lambda: offset_of(site, upload.upload_id).headers["Upload-Offset"] == "10")
    else:
        wait_until(
            lambda: site.append(upload.upload_id, b"", offset=10, complete=False).status_code == 204
        )
    assert not hq.services.receiving.is_held(work.id)
    assert part.read_bytes() == delta.data[:10]
    finish.set()
    thread.join(20)


def test_headers_say_what_the_draft_asks_for(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)
    digest = format_digest(delta.manifest.sha256)
    path = {"upload_id": upload.upload_id}
    partial = {"Content-Type": "application/partial-upload", "Repr-Digest": digest}
    begun = site.call(
        routes.UPLOAD_APPEND,
        parts=path,
        headers={**partial, "Upload-Offset": "0", "Upload-Complete": "?0"},
        content=delta.data[:100],
    )
    assert (begun.status_code, begun.headers["Upload-Complete"]) == (204, "?0")
    assert offset_of(site, upload.upload_id).headers["Upload-Complete"] == "?0"
    done = site.call(
        routes.UPLOAD_APPEND,
        parts=path,
        headers={**partial, "Upload-Offset": "100", "Upload-Complete": "?1"},
        content=delta.data[100:],
    )
    assert (done.status_code, done.headers["Upload-Complete"]) == (200, "?1")
    assert offset_of(site, upload.upload_id).headers["Upload-Complete"] == "?1"


def test_bytes_of_another_delta_are_refused(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)
    headers = {
        "Upload-Offset": "0",
        "Upload-Complete": "?1",
        "Repr-Digest": format_digest("0" * 64),
    }
    parts = {"upload_id": upload.upload_id}
    answer = site.call(routes.UPLOAD_APPEND, parts=parts, headers=headers, content=delta.data)
    assert (answer.status_code, answer.json()["code"]) == (409, "delta-conflict")
    assert offset_of(site, upload.upload_id).headers["Upload-Offset"] == "0"


@pytest.mark.parametrize("text", ["", "md5=:abc:", "sha-256=abc", "sha-256=:x:", "sha-512=::"])
def test_other_digests_say_nothing(text: str) -> None:
    assert parse_digest(text) is None


def test_a_digest_is_found_among_others() -> None:
    sha256 = bytes(range(32)).hex()
    assert parse_digest(format_digest(sha256)) == sha256
    assert parse_digest(f"md5=:AAAA:, {format_digest(sha256)}, sha-512=:AAAA:") == sha256


def test_what_arrived_before_a_broken_connection_is_kept(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)

    def breaking() -> Iterator[bytes]:
        yield delta.data[:500]
        wait_until(lambda: hq.services.receiving.is_held(work.id))
        threading.Event().wait(0.3)
        raise ConnectionAbortedError

    with connection(hq.url, site.http.headers) as http, pytest.raises(ConnectionAbortedError):
        Site(site.client_id, site.credential, http).append(upload.upload_id, breaking())
    wait_until(lambda: site.announce(delta).offset_bytes == 500)
    wait_until(lambda: not hq.services.receiving.is_held(work.id))
    assert site.append(upload.upload_id, delta.data[500:], offset=500).status_code == 200


def test_a_refused_announcement_discards_what_arrived(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    upload = site.announce(delta)
    site.append(upload.upload_id, delta.data[:500], complete=False)
    part = hq.services.home.upload_part(UploadId(upload.upload_id))
    assert part.exists()
    hq.services.store.settle(work.id, AssignmentState.REFUSED, "by hand", 0.0)
    assert site.call(routes.UPLOAD_CREATE, delta.manifest).status_code == 409
    assert not part.exists()
    assert hq.services.store.uploads_of(work.id) == []


def test_a_published_round_discards_what_came_only_in_part(
    hq: Headquarters, participants: Participants
) -> None:
    (slow, slow_work), (other, others_work) = participants()
    upload = slow.announce(hq.delta(slow_work))
    slow.append(upload.upload_id, b"begun", complete=False)
    part = hq.services.home.upload_part(UploadId(upload.upload_id))
    assert slow.call(routes.OFFLINE).status_code == 204
    assert other.send(hq.delta(others_work)).status_code == 200
    with hq.site("replacement", others_work.run) as third:
        assert part.exists()
        assert third.send(hq.delta(third.work())).status_code == 200
        wait_until(lambda: not part.exists())


def test_a_start_discards_what_can_no_longer_be_admitted(
    hq: Headquarters, participants: Participants
) -> None:
    (site, work), (other, others_work) = participants()
    living = site.announce(hq.delta(work))
    site.append(living.upload_id, b"begun", complete=False)
    dead = hq.services.home.upload_part(UploadId("nobodys"))
    dead.write_bytes(b"left over")
    other.append(other.announce(hq.delta(others_work)).upload_id, b"begun too", complete=False)
    discard_dead_uploads(hq.services)
    assert not dead.exists()
    assert site.announce(hq.delta(work)).offset_bytes == 5
