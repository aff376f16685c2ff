"""Weights come from mirrors when they are right there, and a mirror never does harm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import pytest

from fedra_edge.bandwidth import Bandwidth
from fedra_edge.errors import MirrorTooSlowError, ServerUnreachableError
from fedra_edge.layer_cache import LayerCache
from fedra_edge.link import Link
from fedra_edge.metering import OnBytes
from fedra_edge.mirrors import MirroredFetch, ShareMirror, SpeedWatch, open_mirrors
from fedra_edge.protocol.models import BlobRef
from fedra_edge.transport import Transport, open_http_client
from tests.support.disks import small_disk
from tests.support.wire_server import Received, Reply, serving, unused_port

CONTENT = bytes(range(256)) * 8000
NAME = sha256(CONTENT).hexdigest()
REF = BlobRef(sha256=NAME, size_bytes=len(CONTENT))


class Server:
    """Downloads from headquarters, counted."""

    def __init__(self) -> None:
        self.fetched = 0

    def __call__(self, _ref: BlobRef, part: Path, on_bytes: OnBytes) -> str:
        self.fetched += 1
        on_bytes(part.write_bytes(CONTENT))
        return NAME


MakeCache = Callable[..., LayerCache]


@pytest.fixture
def make_cache(tmp_path: Path) -> Iterator[MakeCache]:
    """Make a cache that looks at mirrors before it asks the server."""
    with ExitStack() as stack:

        def make(server: Server, *places: str) -> LayerCache:
            opened = open_mirrors(places, Link(), Bandwidth(None))
            for _, mirror in opened:
                stack.callback(mirror.close)
            return LayerCache(tmp_path / "home" / "blobs", 10**9, MirroredFetch(opened, server))

        yield make


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("place", [f"{NAME[:2]}/{NAME}", f"blobs/{NAME[:2]}/{NAME}", NAME])
def test_a_directory_is_used_instead_of_the_server(
    tmp_path: Path, make_cache: MakeCache, place: str
) -> None:
    file = tmp_path / "stick" / place
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    server = Server()
    cache = make_cache(server, str(tmp_path / "stick"))
    assert cache.path(REF).read_bytes() == CONTENT
    assert server.fetched == 0
    assert files_in(tmp_path / "home") == [NAME]


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], b"x" + CONTENT[1:], CONTENT + b"x"])
def test_a_wrong_file_is_passed_over_with_one_warning(
    tmp_path: Path, make_cache: MakeCache, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / NAME).write_bytes(content)
    server = Server()
    cache = make_cache(server, str(tmp_path / "stick"))
    path = cache.path(REF)
    assert path.read_bytes() == CONTENT
    path.unlink()
    cache.path(REF)
    assert server.fetched == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"copy of {NAME} is damaged" in caplog.text
    assert "its others are still used" in caplog.text
    assert files_in(tmp_path / "home") == [NAME]


def test_a_mirror_that_is_not_there_is_told_once(
    tmp_path: Path, make_cache: MakeCache, caplog: pytest.LogCaptureFixture
) -> None:
    places = (str(tmp_path / "pulled-out"), f"http://127.0.0.1:{unused_port()}")
    server = Server()
    cache = make_cache(server, *places)
    for _ in range(2):
        cache.path(REF).unlink()
    assert server.fetched == 2
    assert len(caplog.records) == 2
    assert all(place in caplog.text for place in places)


def test_a_mirror_need_not_have_everything(
    tmp_path: Path, make_cache: MakeCache, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "stick").mkdir()
    server = Server()
    missing = Reply(404, b"<html>no</html>")
    with serving(lambda _received: missing) as share:
        make_cache(server, str(tmp_path / "stick"), share.url).path(REF)
    assert server.fetched == 1
    assert caplog.records == []


def test_a_mirror_that_had_none_of_many_files_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "stick").mkdir()
    mirrors = open_mirrors([str(tmp_path / "stick")], Link(), Bandwidth(None))
    fetch = MirroredFetch(mirrors, Server())
    for _ in range(20):
        fetch(REF, tmp_path / "part", lambda _n: None)
    (told,) = caplog.records
    assert "had none of the first 8 files" in told.getMessage()


def test_a_mirror_that_had_a_file_may_lack_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / NAME).write_bytes(CONTENT)
    mirrors = open_mirrors([str(tmp_path / "stick")], Link(), Bandwidth(None))
    fetch = MirroredFetch(mirrors, Server())
    for name in [NAME] + ["0" * 64] * 20:
        ref = BlobRef(sha256=name, size_bytes=len(CONTENT))
        fetch(ref, tmp_path / "part", lambda _n: None)
    assert caplog.records == []


def test_a_share_is_resumed_and_told_no_credential(make_cache: MakeCache) -> None:
    place = f"/weights/{NAME[:2]}/{NAME}"

    def serve(received: Received) -> Reply:
        if received.path != place:
            return Reply(404)
        start = int(received.headers.get("Range", "bytes=0-")[6:-1])
        told = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
        return Reply(206 if start else 200, CONTENT[start:], told, cut_after=900_000)

    server = Server()
    with serving(serve) as share:
        cache = make_cache(server, f"{share.url}/weights")
        assert cache.path(REF).read_bytes() == CONTENT
        asked = [received.headers.get("Range") for received in share.received]
        assert all("Authorization" not in received.headers for received in share.received)
    assert asked == [None, "bytes=900000-", "bytes=1800000-"]
    assert server.fetched == 0


def test_what_a_mirror_spoiled_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / NAME).write_bytes(b"x" * len(CONTENT))
    counted: list[int] = []
    mirrors = open_mirrors([str(tmp_path / "stick")], Link(), Bandwidth(None))
    MirroredFetch(mirrors, Server())(REF, tmp_path / "part", counted.append)
    assert sum(counted) == len(CONTENT)
    assert max(counted) > 0


def test_a_file_of_another_size_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / NAME).write_bytes(CONTENT * 3)
    counted: list[int] = []
    mirrors = open_mirrors([str(tmp_path / "stick")], Link(), Bandwidth(None))
    MirroredFetch(mirrors, Server())(REF, tmp_path / "part", counted.append)
    assert sum(size_bytes for size_bytes in counted if size_bytes > 0) == len(CONTENT)


def test_a_copy_for_which_there_is_no_space_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / NAME).write_bytes(CONTENT)
    found: list[list[str]] = []
    with small_disk(tmp_path / "disk", size_bytes=len(CONTENT) // 2) as disk:

        def complete(_ref: BlobRef, part: Path, _on_bytes: OnBytes) -> str:
            found.append(files_in(part.parent))
            return NAME

        (disk / "part").write_bytes(CONTENT[:10])
        mirrors = open_mirrors([str(tmp_path / "stick")], Link(), Bandwidth(None))
        assert MirroredFetch(mirrors, complete)(REF, disk / "part", lambda _n: None) == NAME
    assert found == [["part"]]


def test_a_share_that_trickles_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trickle(received: Received) -> Reply:
        start = int(received.headers.get("Range", "bytes=0-")[6:-1])
        told = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
        return Reply(206 if start else 200, CONTENT[start:], told, cut_after=1)

    server = Server()
    with serving(trickle) as share, open_http_client(share.url) as client:
        mirror = ShareMirror(Transport(client), watched_s=0.2)
        fetch = MirroredFetch([(share.url, mirror)], server)
        fetch(REF, tmp_path / "part", lambda _n: None)
        num_received = len(share.received)
        fetch(REF, tmp_path / "part", lambda _n: None)
        assert len(share.received) == num_received
    assert server.fetched == 2
    assert "is of no use: it brought" in caplog.text


def test_a_transfer_may_be_slow_for_a_moment_but_not_for_long() -> None:
    times = iter([0.0, 29.0, 30.0, 59.0, 60.0])
    watch = SpeedWatch(lambda _n: None, 100, watched_s=30.0, clock=lambda: next(times))
    for size_bytes in (1, 1, 2998, 2999):
        watch(size_bytes)
    with pytest.raises(MirrorTooSlowError, match="2999 bytes in 30 s"):
        watch(0)


def test_a_failing_server_still_keeps_what_came(tmp_path: Path) -> None:
    def fail(_ref: BlobRef, part: Path, _on_bytes: OnBytes) -> str:
        part.write_bytes(CONTENT[:10])
        raise ServerUnreachableError("cut")

    with pytest.raises(ServerUnreachableError):
        MirroredFetch([], fail)(REF, tmp_path / "part", lambda _n: None)
    assert (tmp_path / "part").read_bytes() == CONTENT[:10]
