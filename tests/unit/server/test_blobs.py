"""A blob is whole or not there, and a full disk takes nothing with it."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from fedra_server.errors import NotFoundError, StorageError, StorageFullError
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.durability import disk_errors, write_durably
from tests.support.disks import fill, small_disk

DATA = bytes(range(256)) * 9_000


def files_in(directory: Path) -> list[str]:
    return sorted(it.name for it in directory.rglob("*") if it.is_file())


def test_bytes_and_a_file_of_the_same_content_are_one_blob(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    source = tmp_path / "source"
    source.write_bytes(DATA)
    first, second = blobs.put_bytes(DATA), blobs.put_file(source)
    digest = hashlib.sha256(DATA).hexdigest()
    assert first == second
    assert (first.sha256, first.size_bytes) == (digest, len(DATA))
    assert blobs.path(digest) == tmp_path / "blobs" / digest[:2] / digest
    assert blobs.path(digest).read_bytes() == DATA
    assert files_in(tmp_path / "blobs") == [digest]
    assert source.exists()


def test_several_are_added_at_once_in_their_order(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    there = blobs.put_bytes(DATA)
    refs = blobs.put_all([[b"one"], [DATA[:10], memoryview(DATA)[10:]], [b"one"], []])
    assert refs == [blobs.put_bytes(b"one"), there, refs[0], blobs.put_bytes(b"")]
    assert [blobs.path(ref.sha256).read_bytes() for ref in refs] == [b"one", DATA, b"one", b""]
    assert list((tmp_path / "incoming").iterdir()) == []


def test_no_bytes_are_a_blob_too(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    assert blobs.path(blobs.put_bytes(b"").sha256).read_bytes() == b""


@pytest.mark.parametrize("name", ["0" * 64, "", "ab", "../../etc/passwd", "A" * 64])
def test_what_is_no_blob_is_not_found(tmp_path: Path, name: str) -> None:
    blobs = BlobStore(tmp_path)
    assert not blobs.has(name)
    with pytest.raises(NotFoundError):
        blobs.path(name)


def test_a_file_that_cannot_be_read_is_a_storage_error(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    with pytest.raises(StorageError, match="missing"):
        blobs.put_file(tmp_path / "missing")
    assert files_in(tmp_path) == []


def test_many_may_add_the_same_blob_at_once(tmp_path: Path) -> None:
    stores = [BlobStore(tmp_path) for _ in range(4)]
    threads = [threading.Thread(target=store.put_bytes, args=(DATA,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files_in(tmp_path) == [hashlib.sha256(DATA).hexdigest()]


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path: Path) -> None:
    BlobStore(tmp_path)
    fresh, stale = tmp_path / "incoming" / "fresh.part", tmp_path / "incoming" / "stale.part"
    fresh.write_bytes(b"half")
    stale.write_bytes(b"half")
    os.utime(stale, (1.0, 1.0))
    BlobStore(tmp_path)
    assert files_in(tmp_path) == ["fresh.part"]


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size_bytes=2**20) as disk:
        blobs = BlobStore(disk / "blobs")
        kept = blobs.put_bytes(b"kept")
        with pytest.raises(StorageFullError) as caught:
            blobs.put_bytes(DATA)
        assert caught.value.remedy
        assert files_in(disk) == [kept.sha256]
        filler = fill(disk)
        with pytest.raises(StorageFullError):
            blobs.put_bytes(DATA[:5_000])
        filler.unlink()
        assert blobs.has(blobs.put_bytes(DATA[:5_000]).sha256)


def test_other_disk_errors_say_what_was_being_done() -> None:
    with (
        pytest.raises(StorageError, match="reading the moon") as caught,
        disk_errors("reading the moon"),
    ):
        raise PermissionError(13, "Permission denied")
    assert not isinstance(caught.value, StorageFullError)


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    place = tmp_path / "settings"
    write_durably(place, b"old")
    write_durably(place, b"new")
    assert place.read_bytes() == b"new"
    assert files_in(tmp_path) == ["settings"]
