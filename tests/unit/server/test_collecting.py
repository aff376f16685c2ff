"""The collector beside others: those who put a blob keep it, and a killed one leaves no gap."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedra_edge.protocol.ids import AssignmentId, UploadId
from fedra_server.clock import SystemClock
from fedra_server.config import ServerHome
from fedra_server.runs import AssignmentState
from fedra_server.storage.blobs import BlobStore, StoredBlob
from fedra_server.storage.collecting import Collector
from fedra_server.storage.store import Store
from tests.support.builders import (
    make_assignment,
    make_client,
    make_model_spec,
    make_revision,
    make_round,
    make_run,
    make_upload,
)
from tests.support.servers import run_server_command

OLD = (1.0, 1.0)


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[Collector]:
    """A home with one pending assignment and its upload."""
    home = ServerHome(tmp_path / "home")
    home.create()
    store = Store.open(home.path)
    store.add_model(make_model_spec(), now=0)
    store.add_client(make_client(), "0" * 64)
    store.add_run(make_run(), make_revision())
    store.open_round(make_round(), [make_assignment()])
    store.add_upload(make_upload())
    yield Collector(store, BlobStore(home.blobs), home, SystemClock())
    store.close()


def grow_old(blobs: BlobStore, sha256: str) -> StoredBlob:
    os.utime(blobs.path(sha256), OLD)
    return next(blob for blob in blobs.stored() if blob.sha256 == sha256)


def test_only_an_old_orphan_goes(collector: Collector) -> None:
    old, young = collector.blobs.put_bytes(b"old"), collector.blobs.put_bytes(b"young")
    grow_old(collector.blobs, old.sha256)
    collected = collector.collect()
    assert (collected.blobs, collected.freed_bytes) == (1, old.size_bytes)
    assert not collector.blobs.has(old.sha256)
    assert collector.blobs.has(young.sha256)


def test_an_orphan_that_is_put_again_is_young(collector: Collector) -> None:
    blob = collector.blobs.put_bytes(b"again")
    listed = grow_old(collector.blobs, blob.sha256)
    collector.blobs.put_bytes(b"again")
    assert not collector.blobs.remove_unless_put(listed)
    assert collector.collect().blobs == 0
    assert collector.blobs.path(blob.sha256).read_bytes() == b"again"


def test_whoever_puts_a_blob_while_it_is_collected_has_it(tmp_path: Path) -> None:
    blobs, other = BlobStore(tmp_path), BlobStore(tmp_path)
    for number in range(200):
        data = f"blob {number % 3}".encode()
        listed = grow_old(blobs, blobs.put_bytes(data).sha256)
        barrier = threading.Barrier(2)

        def put(data: bytes = data, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            other.put_bytes(data)

        thread = threading.Thread(target=put)
        thread.start()
        barrier.wait()
        blobs.remove_unless_put(listed)
        thread.join()
        assert blobs.path(listed.sha256).read_bytes() == data
    assert list((tmp_path / "incoming").iterdir()) == []


def test_a_blob_that_a_killed_collector_held_comes_back(collector: Collector) -> None:
    blob = collector.blobs.put_bytes(b"held")
    place = collector.blobs.path(blob.sha256)
    place.replace(collector.home.blobs / "incoming" / f"{blob.sha256}.aside")
    assert not collector.blobs.has(blob.sha256)
    collector.restore()
    assert place.read_bytes() == b"held"


def test_a_delta_that_was_moved_and_not_recorded_waits_to_be_admitted(collector: Collector) -> None:
    file = collector.home.delta_file(AssignmentId("assignment-1"))
    file.write_bytes(b"delta")
    collector.restore()
    assert not file.exists()
    assert collector.home.upload_part(UploadId("upload-1")).read_bytes() == b"delta"


def test_a_counted_delta_stays_where_it_is(collector: Collector) -> None:
    name = AssignmentId("assignment-1")
    collector.store.settle(name, AssignmentState.ADMITTED, "", now=1.0)
    file = collector.home.delta_file(name)
    file.write_bytes(b"delta")
    os.utime(file, OLD)
    collector.restore()
    collector.collect()
    assert file.read_bytes() == b"delta"


def test_a_file_that_belongs_to_no_assignment_goes_after_a_day(collector: Collector) -> None:
    old, young = (collector.home.deltas / f"{name}.safetensors" for name in ("old", "young"))
    part = collector.home.path / ".server.json.1.part"
    for file in (old, young, part):
        file.write_bytes(b"left over")
    os.utime(old, OLD)
    os.utime(part, OLD)
    assert collector.collect().deltas == 1
    assert (old.exists(), young.exists(), part.exists()) == (False, True, False)


def test_prune_tells_what_it_would_do_and_then_does_it(collector: Collector) -> None:
    run_server_command("init", "--home", str(collector.home.path))
    blob = collector.blobs.put_bytes(b"orphan")
    grow_old(collector.blobs, blob.sha256)
    command = ("prune", "run", "--keep-revisions", "1", "--home", str(collector.home.path))
    told = json.loads(run_server_command(*command, "--dry-run", "--json").stdout)
    assert told["dry_run"]
    assert collector.blobs.has(blob.sha256)
    done = json.loads(run_server_command(*command, "--json").stdout)
    assert done == {**told, "dry_run": False}
    assert (done["blobs"], done["freed_bytes"], done["deltas"]) == (1, blob.size_bytes, 0)
    assert not collector.blobs.has(blob.sha256)
    assert run_server_command(*command[:3], "0", *command[4:], check=False).returncode == 2
    unknown = run_server_command("prune", "other", *command[2:], check=False)
    assert unknown.returncode == 4
    assert "no run" in unknown.stderr
