"""Space for uploads: granted once, taken back when unused, measured anew before it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedra_edge.protocol.ids import ClientId, UploadId
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.config import ServerHome
from fedra_server.errors import RefusedError, StorageFullError
from fedra_server.expecting import largest_expected_bytes
from fedra_server.runs import RunState
from fedra_server.storage.quotas import SPARE_BYTES, DiskQuota, measure_use
from tests.support.headless import Headless

ONE, TWO = UploadId("one"), UploadId("two")
CLIENT, OTHER = ClientId("client"), ClientId("other")
PLENTY = 2**40


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    place = ServerHome(tmp_path / "server")
    place.create()
    (place.blobs / "ab").mkdir()
    (place.blobs / "ab" / "abcd").write_bytes(bytes(600))
    (place.deltas / "old.safetensors").write_bytes(bytes(300))
    return place


def grant(
    quota: DiskQuota,
    upload_id: UploadId,
    size_bytes: int,
    *,
    free_bytes: int = PLENTY,
    now: float = 0.0,
    is_begun: bool = False,
) -> None:
    quota.grant(upload_id, size_bytes, CLIENT, free_bytes=free_bytes, now=now, is_begun=is_begun)


def test_files_count_wherever_they_lie(home: ServerHome) -> None:
    (home.uploads / "one.part").write_bytes(bytes(7))
    use = measure_use(home)
    assert (use.blobs, use.deltas, use.uploads, use.total) == (600, 300, 7, 907)


def test_what_is_granted_is_taken_at_once(home: ServerHome) -> None:
    quota = DiskQuota(home, 1000)
    grant(quota, ONE, 60)
    with pytest.raises(
        StorageFullError, match="max_disk_bytes allows 1000, of which 960"
    ) as caught:
        grant(quota, TWO, 41)
    assert "fedra-server prune" in caught.value.remedy
    assert "max_disk_bytes" in caught.value.remedy
    grant(quota, TWO, 40)
    grant(quota, ONE, 60)  # announced again: its own space is its own


def test_bytes_that_arrive_count_once(home: ServerHome) -> None:
    quota = DiskQuota(home, 1000)
    grant(quota, ONE, 60)
    quota.note_arrived(ONE, 50, now=0.5)
    grant(quota, TWO, 40, now=0.5)
    with pytest.raises(StorageFullError, match="of which 1000"):
        grant(quota, UploadId("three"), 1, now=0.5)


def test_an_upload_that_has_begun_is_finished(home: ServerHome) -> None:
    quota = DiskQuota(home, 800)
    with pytest.raises(StorageFullError):
        grant(quota, ONE, 1)
    grant(quota, ONE, 1, is_begun=True)


def test_space_that_returns_is_seen_at_once(home: ServerHome) -> None:
    quota = DiskQuota(home, 1000)
    with pytest.raises(StorageFullError):
        grant(quota, ONE, 200, now=10.0)
    assert "900 are taken" not in quota.shortage(free_bytes=PLENTY, now=10.0)
    (home.deltas / "old.safetensors").unlink()
    grant(quota, ONE, 200, now=12.0)


def test_what_an_upload_no_longer_needs_is_free_again(home: ServerHome) -> None:
    quota = DiskQuota(home, 1000)
    grant(quota, ONE, 100)
    quota.release(ONE)
    grant(quota, TWO, 100)


def test_an_upload_nobody_speaks_of_loses_its_claim(home: ServerHome) -> None:
    quota = DiskQuota(home, 1000)
    grant(quota, ONE, 100, now=0.0)
    with pytest.raises(StorageFullError):
        grant(quota, TWO, 100, now=500.0)
    grant(quota, TWO, 100, now=700.0)


@pytest.mark.parametrize("limit_bytes", [None, PLENTY])
def test_who_fell_silent_keeps_nobody_from_the_disk(
    home: ServerHome, limit_bytes: int | None
) -> None:
    quota = DiskQuota(home, limit_bytes)
    free_bytes = SPARE_BYTES + 150
    grant(quota, ONE, 100, free_bytes=free_bytes)
    with pytest.raises(StorageFullError, match="the disk has"):
        grant(quota, TWO, 60, free_bytes=free_bytes, now=500.0)
    grant(quota, TWO, 60, free_bytes=free_bytes, now=700.0)


def test_who_fell_silent_is_not_remembered(home: ServerHome) -> None:
    quota = DiskQuota(home, None)
    for index in range(100):
        grant(quota, UploadId(f"vanished-{index}"), 100, now=index * 700.0)
    assert list(quota._awaited) == ["vanished-99"]


def test_what_has_begun_counts_towards_the_limit_however_long_it_is_silent(
    home: ServerHome,
) -> None:
    quota = DiskQuota(home, 1900)
    for upload_id in (ONE, TWO):
        grant(quota, upload_id, 450)
        (home.uploads / f"{upload_id}.part").write_bytes(b"x")
        quota.note_arrived(upload_id, 1, now=0.0)
    with pytest.raises(StorageFullError, match="of which 1800"):
        grant(quota, UploadId("three"), 101, now=700.0)
    grant(quota, UploadId("three"), 100, now=700.0)
    with pytest.raises(StorageFullError, match="the disk has 0 left"):
        grant(quota, ONE, 449, free_bytes=0, now=700.0, is_begun=True)
    with pytest.raises(StorageFullError, match="of which 1900"):
        grant(quota, UploadId("four"), 1, now=702.0)
    (home.uploads / "one.part").unlink()
    grant(quota, UploadId("four"), 450, now=704.0)


def test_a_full_disk_refuses_whatever_the_limit_says(home: ServerHome) -> None:
    quota = DiskQuota(home, None)
    grant(quota, ONE, 100, free_bytes=SPARE_BYTES + 100)
    with pytest.raises(StorageFullError, match="the disk has 16777217 left"):
        grant(quota, TWO, 2, free_bytes=SPARE_BYTES + 101)
    with pytest.raises(StorageFullError):
        grant(quota, ONE, 100, free_bytes=SPARE_BYTES + 99, is_begun=True)


def test_a_shortage_is_told_before_anybody_is_refused(home: ServerHome) -> None:
    assert DiskQuota(home, None).shortage(free_bytes=PLENTY, now=0.0) == ""
    assert "the disk has 5 left" in DiskQuota(home, None).shortage(free_bytes=5, now=0.0)
    told = DiskQuota(home, 900).shortage(free_bytes=PLENTY, now=0.0)
    assert told == "max_disk_bytes allows 900, of which 900 are taken"


def test_refusing_is_told_when_it_begins_and_when_it_ends(
    home: ServerHome, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedra_server.storage.quotas")
    quota = DiskQuota(home, 1000)
    for now in (0.0, 2.0, 4.0):
        with pytest.raises(StorageFullError):
            grant(quota, ONE, 200, now=now)
    grant(quota, TWO, 10, now=5.0)
    [begun] = caplog.messages
    assert "refused for want of space: max_disk_bytes allows 1000" in begun
    (home.deltas / "old.safetensors").unlink()
    grant(quota, ONE, 200, now=70.0)
    grant(quota, UploadId("three"), 100, now=71.0)
    assert caplog.messages[1:] == ["deltas are taken in again"]


def test_there_is_no_space_where_the_largest_expected_delta_does_not_fit(tmp_path: Path) -> None:
    server = Headless(tmp_path)
    try:
        assert largest_expected_bytes(server.store) == 1
        server.create_run(RunState.RUNNING)
        assert server.coordinator.advance() is False
        client = server.enrol("one"), server.enrol("two")
        assert server.coordinator.advance()
        needed_bytes = largest_expected_bytes(server.store)
        for client_id in client:
            server.deliver(server.assignments(1)[client_id])
        held = [it.stat().st_size for it in server.home.deltas.iterdir()]
        assert max(held) <= needed_bytes <= 2**20
        quota = DiskQuota(server.home, measure_use(server.home).total + needed_bytes - 1)
        assert not quota.shortage(free_bytes=PLENTY, now=0.0)
        assert quota.shortage(needed_bytes, free_bytes=PLENTY, now=0.0)
    finally:
        server.store.close()


def test_a_client_has_so_many_deltas_on_their_way_and_no_more(home: ServerHome) -> None:
    quota = DiskQuota(home, None, most_of_one=2)
    grant(quota, ONE, 10)
    grant(quota, TWO, 10)
    with pytest.raises(RefusedError) as caught:
        grant(quota, UploadId("three"), 10)
    assert caught.value.code is ProblemCode.TOO_MANY_UPLOADS
    grant(quota, ONE, 10)  # announced again
    quota.grant(UploadId("four"), 10, OTHER, free_bytes=PLENTY, now=0.0, is_begun=False)
    grant(quota, UploadId("five"), 10, is_begun=True)
    quota.note_arrived(TWO, 10, now=0.0)
    quota.release(UploadId("five"))
    grant(quota, UploadId("three"), 10)


def test_what_stands_here_from_before_a_restart_counts_for_its_client(home: ServerHome) -> None:
    quota = DiskQuota(home, None, most_of_one=1)
    (home.uploads / "one.part").write_bytes(b"begun")
    quota.expect_rest(ONE, 10, CLIENT)
    with pytest.raises(RefusedError):
        grant(quota, TWO, 10)
    quota.grant(TWO, 10, OTHER, free_bytes=PLENTY, now=0.0, is_begun=False)
