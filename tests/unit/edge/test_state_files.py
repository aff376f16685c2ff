"""Whatever lies in the place of a state file: it is kept, told, and blocks nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedra_edge.home_lock import home_lock
from fedra_edge.identity import Identity, IdentityFile
from fedra_edge.outbox import Outbox
from fedra_edge.protocol.ids import AssignmentId, ClientId
from tests.support.builders import make_training_report

SERVER = "https://plant.example"
IDENTITY = Identity(ClientId("c1"), "ab" * 32)
TEN_YEARS_S = 10 * 365 * 86_400

Damage = Callable[[Path], object]


def in_its_place(path: Path) -> None:
    path.unlink()
    (path / "somebody's").mkdir(parents=True)


def edited(**changes: object) -> Damage:
    def edit(path: Path) -> None:
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(values | changes), encoding="utf-8")

    return edit


DAMAGES: dict[str, Damage] = {
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(bytes(range(256))),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a list": lambda path: path.write_bytes(b"[1, 2]"),
    "newer": edited(version=9),
    "version of a wrong type": edited(version="one"),
    "a directory": in_its_place,
}


def put(outbox: Outbox, name: str) -> None:
    report = make_training_report()
    outbox.put(AssignmentId(name), [b"tensors"], num_examples=5, report=report)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_identity_that_is_not_understood_is_set_aside(
    tmp_path: Path, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    file = IdentityFile(tmp_path, SERVER)
    file.save(IDENTITY)
    damage(tmp_path / "identity.json")
    was_file = (tmp_path / "identity.json").is_file()
    content = (tmp_path / "identity.json").read_bytes() if was_file else b""
    with caplog.at_level(logging.WARNING):
        assert file.load() is None
    [kept] = (tmp_path / "damaged").iterdir()
    assert str(kept) in caplog.text
    assert kept.read_bytes() == content if was_file else kept.is_dir()
    file.save(IDENTITY)
    assert file.load() == IDENTITY


@pytest.mark.parametrize("changes", [{"client_id": 3}, {"ca_sha256": None}, {"server": [1]}])
def test_an_identity_with_wrong_types_is_set_aside(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    file = IdentityFile(tmp_path, SERVER)
    file.save(IDENTITY)
    edited(**changes)(tmp_path / "identity.json")
    assert file.load() is None
    assert len(list((tmp_path / "damaged").iterdir())) == 1


def test_an_identity_from_before_versions_is_understood(tmp_path: Path) -> None:
    file = IdentityFile(tmp_path, SERVER)
    file.save(IDENTITY)
    path = tmp_path / "identity.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values.pop("version") == 2
    path.write_text(json.dumps(values), encoding="utf-8")
    assert file.load() == IDENTITY


@pytest.mark.parametrize("victim", ["a1.json", "a1.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_delta_that_is_not_understood_is_set_aside(
    tmp_path: Path, damage: Damage, victim: str, caplog: pytest.LogCaptureFixture
) -> None:
    if victim == "a1.safetensors" and damage in {
        DAMAGES["newer"],
        DAMAGES["version of a wrong type"],
    }:
        damage = DAMAGES["noise"]
    outbox = Outbox(tmp_path)
    for name in ("a1", "a2"):
        put(outbox, name)
    damage(tmp_path / victim)
    assert [parcel.manifest.id for parcel in outbox.parcels()] == ["a2"]
    assert str(tmp_path / "damaged") in caplog.text
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"a1.json", "a1.safetensors"}
    put(outbox, "a1")
    assert [parcel.manifest.id for parcel in outbox.parcels()] == ["a2", "a1"]


def test_a_delta_takes_the_place_of_a_directory(tmp_path: Path) -> None:
    for name in ("a1.json", "a1.safetensors"):
        (tmp_path / name).mkdir()
    put(Outbox(tmp_path), "a1")
    assert [parcel.manifest.id for parcel in Outbox(tmp_path).parcels()] == ["a1"]


def test_half_a_file_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    put(outbox, "a1")
    for name in ("a2.safetensors.new", "a3.json.new"):
        (tmp_path / name).write_bytes(b"half")
    assert [parcel.manifest.id for parcel in outbox.parcels()] == ["a1"]
    assert {path.name for path in tmp_path.iterdir()} == {"a1.json", "a1.safetensors"}


def test_deltas_keep_their_order_when_the_clock_goes_back(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    put(outbox, "b")
    ahead = time.time() + TEN_YEARS_S
    os.utime(tmp_path / "b.json", (ahead, ahead))
    for name in ("c", "a"):
        put(outbox, name)
    assert [parcel.manifest.id for parcel in Outbox(tmp_path).parcels()] == ["b", "c", "a"]


def test_a_directory_in_the_place_of_the_lock_blocks_nothing(tmp_path: Path) -> None:
    (tmp_path / "lock" / "somebody's").mkdir(parents=True)
    with home_lock(tmp_path):
        assert (tmp_path / "lock").is_file()
    assert (tmp_path / "damaged" / "lock" / "somebody's").is_dir()
    shutil.rmtree(tmp_path / "damaged")
