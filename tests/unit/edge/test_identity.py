"""The identity survives everything but its own damage, and never blocks joining."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path

import pytest

from fedra_edge.errors import IdentityError
from fedra_edge.identity import FILE_NAME, Identity, IdentityFile, known_servers
from fedra_edge.protocol.ids import ClientId

SERVER = "https://plant.example"
IDENTITY = Identity(ClientId("c1"), "ab" * 32)


def test_there_is_no_identity_at_first(tmp_path: Path) -> None:
    assert IdentityFile(tmp_path, SERVER).load() is None


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    IdentityFile(tmp_path / "deep", SERVER).save(IDENTITY)
    assert IdentityFile(tmp_path / "deep", SERVER).load() == IDENTITY


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    IdentityFile(tmp_path, SERVER).save(IDENTITY)
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"{", b'{"client_id": 3}', b"\xff\xfe\x00"])
def test_a_damaged_file_is_set_aside_and_told(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert IdentityFile(tmp_path, SERVER).load() is None
    assert "enrolling anew" in caplog.text
    assert [path.read_bytes() for path in (tmp_path / "damaged").iterdir()] == [content]
    IdentityFile(tmp_path, SERVER).save(IDENTITY)
    assert IdentityFile(tmp_path, SERVER).load() == IDENTITY


def test_damaged_files_never_overwrite_each_other(tmp_path: Path) -> None:
    for content in (b"1", b"2", b"3"):
        (tmp_path / FILE_NAME).write_bytes(content)
        assert IdentityFile(tmp_path, SERVER).load() is None
    assert len(list((tmp_path / "damaged").iterdir())) == 3


def test_an_identity_of_another_server_is_not_used(tmp_path: Path) -> None:
    IdentityFile(tmp_path, SERVER).save(IDENTITY)
    assert IdentityFile(tmp_path, "https://other.example").load() is None


def test_a_place_that_cannot_be_written_is_an_identity_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(IdentityError) as refusal:
        IdentityFile(tmp_path / "file" / "home", SERVER).save(IDENTITY)
    assert refusal.value.remedy


def test_forgetting_twice_is_harmless(tmp_path: Path) -> None:
    file = IdentityFile(tmp_path, SERVER)
    file.save(IDENTITY)
    file.forget()
    file.forget()
    assert file.load() is None


def test_a_home_lists_its_servers(tmp_path: Path) -> None:
    IdentityFile(tmp_path / "servers" / "a", SERVER).save(IDENTITY)
    (tmp_path / "servers" / "b").mkdir()
    (tmp_path / "servers" / "b" / FILE_NAME).write_text("{", encoding="utf-8")
    assert known_servers(tmp_path) == [SERVER]


@pytest.mark.parametrize("server", [SERVER, "https://elsewhere.example"])
def test_an_identity_from_before_keys_is_set_aside_and_still_tells_who_it_was(
    tmp_path: Path, server: str
) -> None:
    before = {"version": 1, "server": server, "client_id": "c7", "credential": "dead-by-now"}
    (tmp_path / FILE_NAME).write_text(json.dumps(before), encoding="utf-8")
    file = IdentityFile(tmp_path, SERVER)
    assert file.load() is None
    assert file.former_client_id() == "c7"
    assert IdentityFile(tmp_path, SERVER).former_client_id() == "c7"


def test_the_latest_identity_that_still_tells_who_it_was_counts(tmp_path: Path) -> None:
    file = IdentityFile(tmp_path, SERVER)
    assert file.former_client_id() is None
    for time_s, content in enumerate([b'{"client_id": "c1"}', b'{"client_id": "c2"}', b"{"]):
        (tmp_path / FILE_NAME).write_bytes(content)
        os.utime(tmp_path / FILE_NAME, (time_s, time_s))
        assert file.load() is None
    assert file.former_client_id() == "c2"


@pytest.mark.parametrize("told", ['{"client_id": "../etc"}', '{"client_id": 3}', "[]", "null"])
def test_what_is_no_id_is_not_taken_for_one(tmp_path: Path, told: str) -> None:
    (tmp_path / FILE_NAME).write_text(told, encoding="utf-8")
    file = IdentityFile(tmp_path, SERVER)
    assert file.load() is None
    assert file.former_client_id() is None
