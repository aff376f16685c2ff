"""The cache gives verified files within its quota and never drops what is in use."""

from __future__ import annotations

import os
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest
from typing_extensions import override

from fedra_edge.errors import (
    ServerUnreachableError,
    StorageError,
    StorageFullError,
    UnexpectedAnswerError,
)
from fedra_edge.layer_cache import LayerCache
from fedra_edge.metering import OnBytes
from fedra_edge.protocol.models import BlobRef

KIB = 1024


class Shelf:
    """Holds blobs and counts how often each was fetched."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.resumed_at: list[int] = []

    def add(self, letter: str, size_bytes: int = KIB) -> BlobRef:
        """Put a blob of one repeated letter on the shelf."""
        content = letter.encode() * size_bytes
        ref = BlobRef(sha256=sha256(content).hexdigest(), size_bytes=size_bytes)
        self.contents[ref.sha256] = content
        return ref

    def fetch(self, ref: BlobRef, part: Path, on_bytes: OnBytes) -> str:
        """Complete a file, as a download would."""
        start = part.stat().st_size if part.exists() else 0
        self.fetched.append(ref.sha256)
        self.resumed_at.append(start)
        with part.open("ab") as file:
            on_bytes(file.write(self.contents[ref.sha256][start:]))
        return sha256(part.read_bytes()).hexdigest()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def make_cache(tmp_path: Path, shelf: Shelf, quota_bytes: int = 100 * KIB) -> LayerCache:
    return LayerCache(tmp_path / "blobs", quota_bytes, shelf.fetch)


def test_a_missing_blob_is_fetched_once(tmp_path: Path, shelf: Shelf) -> None:
    cache = make_cache(tmp_path, shelf)
    ref = shelf.add("a")
    assert cache.path(ref).read_bytes() == b"a" * KIB
    assert cache.path(ref) == cache.path(ref)
    assert len(shelf.fetched) == 1
    assert cache.used_bytes == KIB


def test_a_new_process_uses_what_is_there(tmp_path: Path, shelf: Shelf) -> None:
    ref = shelf.add("a")
    make_cache(tmp_path, shelf).path(ref)
    make_cache(tmp_path, shelf).path(ref)
    assert len(shelf.fetched) == 1


def test_a_file_copied_in_by_hand_is_used_when_it_is_right(tmp_path: Path, shelf: Shelf) -> None:
    good, bad = shelf.add("a"), shelf.add("b")
    for ref, content in ((good, b"a" * KIB), (bad, b"x" * KIB)):
        place = tmp_path / "blobs" / ref.sha256[:2] / ref.sha256
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    cache = make_cache(tmp_path, shelf)
    cache.path(good)
    assert shelf.fetched == []
    assert cache.path(bad).read_bytes() == b"b" * KIB


def test_an_unfinished_download_goes_on(tmp_path: Path, shelf: Shelf) -> None:
    ref = shelf.add("a")
    part = tmp_path / "blobs" / ref.sha256[:2] / f"{ref.sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"a" * 100)
    make_cache(tmp_path, shelf).path(ref)
    assert shelf.resumed_at == [100]


def test_a_damaged_part_is_fetched_from_the_start(tmp_path: Path, shelf: Shelf) -> None:
    ref = shelf.add("a")
    part = tmp_path / "blobs" / ref.sha256[:2] / f"{ref.sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 100)
    assert make_cache(tmp_path, shelf).path(ref).read_bytes() == b"a" * KIB
    assert shelf.resumed_at == [100, 0]


def test_bytes_that_are_not_what_they_are_named_are_never_given(
    tmp_path: Path, shelf: Shelf
) -> None:
    ref = shelf.add("a")
    shelf.contents[ref.sha256] = b"z" * KIB
    cache = make_cache(tmp_path, shelf)
    with pytest.raises(UnexpectedAnswerError):
        cache.path(ref)
    assert cache.used_bytes == 0


def test_what_was_used_least_recently_gives_way(tmp_path: Path, shelf: Shelf) -> None:
    cache = make_cache(tmp_path, shelf, quota_bytes=3 * KIB)
    first, second, third, fourth = (shelf.add(letter) for letter in "abcd")
    for ref in (first, second, third, first, fourth):
        cache.path(ref)
    shelf.fetched.clear()
    for ref in (first, third, fourth):
        cache.path(ref)
    assert shelf.fetched == []
    assert cache.used_bytes == 3 * KIB


def test_what_was_used_before_the_clock_went_back_gives_way_first(
    tmp_path: Path, shelf: Shelf
) -> None:
    first, second, third = (shelf.add(letter) for letter in "abc")
    before = make_cache(tmp_path, shelf, quota_bytes=2 * KIB)
    for number, ref in enumerate((first, second)):
        in_ten_years_s = time.time() + 3.2e8 + number
        os.utime(before.path(ref), (in_ten_years_s, in_ten_years_s))
    afterwards = make_cache(tmp_path, shelf, quota_bytes=2 * KIB)
    afterwards.path(first)
    afterwards.path(third)
    shelf.fetched.clear()
    afterwards.path(first)
    assert shelf.fetched == []


def test_what_is_in_use_never_gives_way(tmp_path: Path, shelf: Shelf) -> None:
    cache = make_cache(tmp_path, shelf, quota_bytes=2 * KIB)
    first, second, third = (shelf.add(letter) for letter in "abc")
    with cache.holding():
        held = [cache.path(first), cache.path(second)]
        with pytest.raises(StorageFullError, match="too small") as refusal:
            cache.path(third)
        assert all(path.exists() for path in held)
    assert refusal.value.remedy
    cache.path(third)
    assert not held[0].exists()


def test_unfinished_downloads_count_and_give_way(tmp_path: Path, shelf: Shelf) -> None:
    cache = make_cache(tmp_path, shelf, quota_bytes=2 * KIB)
    old = shelf.add("o", 2 * KIB)
    part = tmp_path / "blobs" / old.sha256[:2] / f"{old.sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"o" * KIB)
    cache.path(shelf.add("a", 2 * KIB))
    assert not part.exists()


def test_a_failed_download_keeps_what_came(tmp_path: Path, shelf: Shelf) -> None:
    ref = shelf.add("a")

    def cut(ref: BlobRef, part: Path, _on_bytes: OnBytes) -> str:
        part.write_bytes(shelf.contents[ref.sha256][:10])
        raise ServerUnreachableError("cut")

    with pytest.raises(ServerUnreachableError):
        LayerCache(tmp_path / "blobs", KIB, cut).path(ref)
    make_cache(tmp_path, shelf).path(ref)
    assert shelf.resumed_at == [10]


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path, shelf: Shelf) -> None:
    (tmp_path / "blobs").write_bytes(b"")
    with pytest.raises(StorageError):
        make_cache(tmp_path, shelf).path(shelf.add("a"))


@pytest.mark.parametrize("suffix", ["", ".part"])
def test_a_directory_at_a_blob_s_place_is_moved_away(
    tmp_path: Path, shelf: Shelf, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    ref = shelf.add("a")
    place = tmp_path / "blobs" / ref.sha256[:2] / f"{ref.sha256}{suffix}"
    place.mkdir(parents=True)
    (place / "precious.txt").write_text("mine", encoding="utf-8")
    cache = make_cache(tmp_path, shelf)
    assert cache.path(ref).read_bytes() == b"a" * KIB
    kept = tmp_path / "blobs" / "foreign" / place.name / "precious.txt"
    assert kept.read_text(encoding="utf-8") == "mine"
    assert "is no file" in caplog.text
    assert cache.used_bytes == KIB


class Gate(Shelf):
    """Lets a download through only when others are under way, and counts them."""

    def __init__(self, together: int) -> None:
        super().__init__()
        self.barrier = threading.Barrier(together)

    @override
    def fetch(self, ref: BlobRef, part: Path, on_bytes: OnBytes) -> str:
        """Wait for the others."""
        self.barrier.wait(20)
        return super().fetch(ref, part, on_bytes)


def test_what_is_missing_comes_over_several_connections_in_order(tmp_path: Path) -> None:
    shelf = Gate(together=3)
    cache = make_cache(tmp_path, shelf)
    refs = [shelf.add(letter) for letter in "abcdef"]
    cache.fetch_all([*refs, refs[0]])
    assert sorted(shelf.fetched) == sorted(ref.sha256 for ref in refs)
    assert set(shelf.fetched[:3]) == {ref.sha256 for ref in refs[:3]}
    shelf.fetched.clear()
    cache.fetch_all(refs)
    assert [cache.path(ref).stat().st_size for ref in refs] == [KIB] * 6
    assert shelf.fetched == []


def test_a_failure_ends_the_rest(tmp_path: Path, shelf: Shelf) -> None:
    refs = [shelf.add(letter) for letter in "abcdefgh"]

    def fail(ref: BlobRef, part: Path, on_bytes: OnBytes) -> str:
        if ref == refs[0]:
            raise ServerUnreachableError("cut")
        return shelf.fetch(ref, part, on_bytes)

    cache = LayerCache(tmp_path / "blobs", 100 * KIB, fail)
    with pytest.raises(ServerUnreachableError):
        cache.fetch_all(refs)
    for ref in refs[1:]:
        assert cache.path(ref).exists()


def test_all_that_is_needed_must_fit_at_the_same_time(tmp_path: Path, shelf: Shelf) -> None:
    cache = make_cache(tmp_path, shelf, quota_bytes=3 * KIB)
    old, *refs = (shelf.add(letter) for letter in "oabcd")
    cache.path(old)
    assert not cache.fits(refs)
    with pytest.raises(StorageFullError, match="too small"):
        cache.fetch_all(refs)
    assert cache.fits(refs[:3])
    cache.fetch_all(refs[:3])
    assert cache.used_bytes == 3 * KIB
    shelf.fetched.clear()
    cache.fetch_all(refs[:3])
    assert shelf.fetched == []


def test_bytes_are_metered_as_they_come(tmp_path: Path, shelf: Shelf) -> None:
    totals: list[int] = []
    counted: list[int] = []

    def meter(total_bytes: int) -> OnBytes:
        totals.append(total_bytes)
        return counted.append

    cache = LayerCache(tmp_path / "blobs", 100 * KIB, shelf.fetch, meter)
    refs = [shelf.add(letter) for letter in "abc"]
    cache.path(refs[0])
    cache.fetch_all(refs)
    assert totals == [KIB, 2 * KIB]
    assert sum(counted) == 3 * KIB


def test_the_cache_gives_way_but_keeps_what_is_held(tmp_path: Path, shelf: Shelf) -> None:
    cache = make_cache(tmp_path, shelf, quota_bytes=100 * KIB)
    refs = [shelf.add(letter) for letter in "abc"]
    paths = [cache.path(ref) for ref in refs]
    with cache.holding():
        cache.path(refs[0])
        assert cache.give_way(1)
        assert [path.exists() for path in paths] == [True, False, True]
        assert cache.give_way(2 * KIB)
        assert not cache.give_way(1)
    assert [path.exists() for path in paths] == [True, False, False]
    assert cache.used_bytes == KIB
