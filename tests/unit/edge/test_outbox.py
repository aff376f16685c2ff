"""A delta in the outbox survives until the server has it, and is never silently lost."""

from __future__ import annotations

import logging
from hashlib import sha256
from pathlib import Path

import pytest

from fedra_edge.errors import StorageError
from fedra_edge.outbox import Outbox, Parcel
from fedra_edge.protocol.ids import AssignmentId
from tests.support.builders import make_training_report

REPORT = make_training_report()


def put(outbox: Outbox, name: str, content: bytes = b"tensors") -> Parcel:
    return outbox.put(AssignmentId(name), [content], num_examples=5, report=REPORT)


def test_an_outbox_without_directory_is_empty(tmp_path: Path) -> None:
    assert Outbox(tmp_path / "none").parcels() == []


def test_a_delta_is_described_by_its_digest_and_size(tmp_path: Path) -> None:
    manifest = put(Outbox(tmp_path), "a1").manifest
    assert manifest.sha256 == sha256(b"tensors").hexdigest()
    assert (manifest.size_bytes, manifest.num_examples, manifest.report) == (7, 5, REPORT)


def test_deltas_are_found_again_by_a_new_process_the_oldest_first(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        put(Outbox(tmp_path), name)
    parcels = Outbox(tmp_path).parcels()
    assert [parcel.manifest.id for parcel in parcels] == ["c", "a", "b"]
    assert all(parcel.file.read_bytes() == b"tensors" for parcel in parcels)


def test_a_delta_is_new_to_be_sent_once_and_to_its_own_process(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    put(outbox, "a1")
    assert [parcel.is_new for parcel in Outbox(tmp_path).parcels()] == [False]
    assert [parcel.is_new for parcel in outbox.parcels()] == [True]
    assert [parcel.is_new for parcel in outbox.parcels()] == [False]


def test_a_delivered_delta_is_gone(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    put(outbox, "a1")
    assert outbox.has(AssignmentId("a1"))
    outbox.remove(AssignmentId("a1"))
    assert not outbox.has(AssignmentId("a1"))
    assert outbox.num_waiting == 0
    assert list(tmp_path.iterdir()) == []


def test_a_refused_delta_is_kept_apart(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    put(outbox, "a1")
    outbox.refuse(AssignmentId("a1"))
    assert outbox.parcels() == []
    assert (tmp_path / "refused" / "a1.safetensors").read_bytes() == b"tensors"


@pytest.mark.parametrize(
    ("victim", "content"),
    [("a1.safetensors", b"tensorz"), ("a1.safetensors", b"ten"), ("a1.json", b"{")],
)
def test_a_damaged_delta_is_set_aside_and_the_others_go_on(
    tmp_path: Path, victim: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Outbox(tmp_path)
    put(outbox, "a1")
    put(outbox, "a2")
    (tmp_path / victim).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert [parcel.manifest.id for parcel in outbox.parcels()] == ["a2"]
    assert "a1 is damaged" in caplog.text
    assert (tmp_path / "damaged" / victim).read_bytes() == content


def test_a_damaged_delta_that_cannot_be_set_aside_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Outbox(tmp_path)
    put(outbox, "a1")
    put(outbox, "a2")
    (tmp_path / "a1.safetensors").write_bytes(b"tensorz")
    (tmp_path / "damaged").write_bytes(b"in the way")
    assert [parcel.manifest.id for parcel in outbox.parcels()] == ["a2"]
    assert "a1 is left alone" in caplog.text
    assert (tmp_path / "a1.json").exists()


def test_tensors_whose_manifest_was_not_written_do_not_take_space_twice(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    (tmp_path / "a1.json.new").mkdir()
    with pytest.raises(StorageError):
        put(outbox, "a1")
    (tmp_path / "a1.json.new").rmdir()
    put(outbox, "a2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a2.json", "a2.safetensors"]


def test_a_manifest_without_its_tensors_is_set_aside(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    put(outbox, "a1").file.unlink()
    assert outbox.parcels() == []
    assert (tmp_path / "damaged" / "a1.json").exists()


def test_what_a_killed_process_left_unfinished_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a1.safetensors").write_bytes(b"tensors")
    assert Outbox(tmp_path).parcels() == []
    assert not (tmp_path / "a1.safetensors").exists()


def test_the_same_assignment_replaces_its_delta(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    put(outbox, "a1", b"one")
    put(outbox, "a1", b"two")
    assert [parcel.file.read_bytes() for parcel in outbox.parcels()] == [b"two"]


def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        put(Outbox(tmp_path / "file" / "outbox"), "a1")
