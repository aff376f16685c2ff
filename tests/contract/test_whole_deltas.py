"""A delta that comes with its announcement in one request, and what is left when it is cut."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.messages import DeltaReceipt
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.slices import SliceManifest
from fedra_server.leaving import end_membership
from fedra_server.runs import AssignmentState
from tests.contract.conftest import Participants
from tests.support.edge_site import eventually
from tests.support.headquarters import Delta, Headquarters, Site, calibrate, connection, enrol


def deliver(
    site: Site,
    delta: Delta,
    content: bytes | Iterator[bytes] | None = None,
    *,
    announcement: bytes | None = None,
) -> httpx.Response:
    """Send a delta in one request, or what a test has in its place."""
    told = delta.manifest.model_dump_json().encode() if announcement is None else announcement
    headers = {
        routes.MANIFEST_LENGTH_HEADER: str(len(told)),
        "Content-Type": "application/partial-upload",
    }
    body = told + delta.data if content is None else content
    return site.call(routes.UPLOAD_WHOLE, headers=headers, content=body)


def test_one_request_is_enough(hq: Headquarters, participant: tuple[Site, SliceManifest]) -> None:
    site, work = participant
    delta = hq.delta(work)
    answer = deliver(site, delta)
    receipt = DeltaReceipt.model_validate_json(answer.content)
    assert (answer.status_code, receipt.assignment_id) == (200, work.assignment_id)
    assert answer.headers["Upload-Complete"] == "?1"
    assert hq.services.home.delta_file(work.id).read_bytes() == delta.data
    assert list(hq.services.home.uploads.glob("*.part")) == []


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_client_that_is_removed_amid_its_delta_is_not_counted(
    hq: Headquarters, is_whole: bool
) -> None:
    with hq.run(f"left-{is_whole}", min_participants=1) as run, connection(hq.url) as http:
        site = enrol(http, f"removed {is_whole}", run.run)
        calibrate(site, hq.spec)
        work = site.work()
        delta = hq.delta(work)
        told = delta.manifest.model_dump_json().encode() if is_whole else b""

        def removed_meanwhile() -> Iterator[bytes]:
            yield told + delta.data[:-1]
            eventually(lambda: hq.services.receiving.is_held(work.id))
            services = hq.services
            now = services.clock.now()
            end_membership(services.store, ClientId(site.client_id), now, removed_by="test")
            yield delta.data[-1:]

        if is_whole:
            answer = deliver(site, delta, removed_meanwhile())
        else:
            answer = site.append(site.announce(delta).upload_id, removed_meanwhile())
        assert (answer.status_code, answer.json()["code"]) == (403, ProblemCode.CLIENT_REVOKED)
        assert hq.services.store.assignment(work.id).state is AssignmentState.FAILED
        assert not hq.services.home.delta_file(work.id).exists()
        assert list(hq.services.home.uploads.glob("*.part")) == []


def test_any_division_into_chunks_is_the_same(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    body = delta.manifest.model_dump_json().encode() + delta.data
    chunks = (body[start : start + 97] for start in range(0, len(body), 97))
    assert deliver(site, delta, chunks).status_code == 200
    assert hq.services.home.delta_file(work.id).read_bytes() == delta.data


def test_what_a_cut_leaves_is_gone_on_with(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    announcement = delta.manifest.model_dump_json().encode()
    finish = threading.Event()

    def broken() -> Iterator[bytes]:
        yield announcement + delta.data[:300]
        finish.wait(20)
        raise ConnectionResetError("the link is gone")

    def send() -> None:
        with (
            connection(hq.url, site.http.headers) as http,
            pytest.raises(ConnectionResetError),
        ):
            deliver(Site(site.client_id, site.credential, http), delta, broken())

    thread = threading.Thread(target=send)
    thread.start()
    eventually(lambda: hq.services.receiving.is_held(work.id))
    finish.set()
    thread.join(20)
    eventually(lambda: not hq.services.receiving.is_held(work.id))
    upload = site.announce(delta)
    assert upload.offset_bytes == 300
    assert site.append(upload.upload_id, delta.data[300:], offset=300).status_code == 200
    assert hq.services.home.delta_file(work.id).read_bytes() == delta.data


def test_what_is_here_in_part_does_not_come_whole(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    site.append(site.announce(delta).upload_id, delta.data[:50], complete=False)
    refused = deliver(site, delta)
    assert (refused.status_code, refused.headers["Upload-Offset"]) == (409, "50")
    assert site.announce(delta).offset_bytes == 50


def test_sending_an_admitted_one_again_changes_nothing(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    receipt = deliver(site, delta).json()
    again = deliver(site, delta)
    assert (again.status_code, again.headers["Upload-Offset"]) == (409, str(len(delta.data)))
    upload = site.announce(delta)
    last = site.append(upload.upload_id, b"", offset=len(delta.data))
    assert (last.status_code, last.json()) == (200, receipt)


def test_altered_bytes_may_be_sent_again(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    delta = hq.delta(work)
    altered = delta.manifest.model_dump_json().encode() + bytes(len(delta.data))
    refused = deliver(site, delta, altered)
    assert (refused.status_code, refused.json()["code"]) == (422, "digest-mismatch")
    assert deliver(site, delta).status_code == 200


@pytest.mark.parametrize("is_length_known", [True, False])
def test_a_body_of_another_length_is_refused(
    hq: Headquarters, participant: tuple[Site, SliceManifest], is_length_known: bool
) -> None:
    site, work = participant
    delta = hq.delta(work)
    body = delta.manifest.model_dump_json().encode() + delta.data + b"more"
    refused = deliver(site, delta, body if is_length_known else iter([body]))
    assert (refused.status_code, refused.json()["code"]) == (413, "delta-too-large")
    short = deliver(site, delta, body[: -len(b"more") - 10])
    assert (short.status_code, short.json()["code"]) == (409, "offset-mismatch")


def test_nobody_delivers_for_another(hq: Headquarters, participants: Participants) -> None:
    (_, work), (other, _) = participants()
    refused = deliver(other, hq.delta(work))
    assert (refused.status_code, refused.json()["code"]) == (403, "not-permitted")
    assert not hq.services.home.delta_file(work.id).exists()


@pytest.mark.parametrize(
    ("announcement", "code"),
    [
        (b"{}", "malformed-request"),
        (b"no JSON", "malformed-request"),
        (b'{"size_bytes": 1, "size_bytes": 2}', "repeated-name"),
        (b"[" * 90_000, "malformed-request"),
        (b" " * 100_001, "request-too-large"),
    ],
)
def test_what_is_no_announcement_is_refused(
    hq: Headquarters,
    participant: tuple[Site, SliceManifest],
    announcement: bytes,
    code: str,
) -> None:
    site, work = participant
    delta = hq.delta(work)
    refused = deliver(site, delta, announcement + delta.data, announcement=announcement)
    assert refused.json()["code"] == code
    assert len(hq.services.receiving) == 0


def test_an_announcement_that_ends_early_is_refused(
    hq: Headquarters, participant: tuple[Site, SliceManifest]
) -> None:
    site, work = participant
    refused = deliver(site, hq.delta(work), b"{", announcement=b"{" * 100)
    assert (refused.status_code, refused.json()["code"]) == (422, "malformed-request")
