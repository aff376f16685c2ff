"""Keys, pins and identities of a home: private, durable, and none of them blocks joining."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedra_edge.identity import Identity
from fedra_edge.keys import FILE_NAME, NEXT_NAME, ClientKey, KeyFiles
from fedra_edge.link import Link
from fedra_edge.membership import Membership
from fedra_edge.pin import Pin
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.trust import certificate_sha256, to_base64url
from tests.support.gate import is_signed
from tests.support.tls_front import tls_front

SERVER = "https://plant.example"


def test_a_key_is_made_once_and_stays(tmp_path: Path) -> None:
    assert KeyFiles(tmp_path / "deep").candidates() == []
    made = KeyFiles(tmp_path / "deep").current()
    assert KeyFiles(tmp_path / "deep").current() == made
    assert KeyFiles(tmp_path / "deep").candidates() == [made]
    assert is_signed(made.public_key, made.sign(b"a message"), b"a message")
    assert not is_signed(made.public_key, made.sign(b"a message"), b"another")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_only_the_owner_may_read_keys(tmp_path: Path) -> None:
    keys = KeyFiles(tmp_path)
    keys.current()
    keys.next()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (FILE_NAME, NEXT_NAME)}
    assert modes == {0o600}


def test_the_private_half_does_not_show(tmp_path: Path) -> None:
    key = KeyFiles(tmp_path).current()
    lines = (tmp_path / FILE_NAME).read_text(encoding="ascii").splitlines()
    assert lines[0] == "-----BEGIN PRIVATE KEY-----"
    assert lines[1] not in repr(key)
    assert "private" not in repr(key).lower()


def test_the_next_key_comes_first_until_it_is_the_current_one(tmp_path: Path) -> None:
    keys = KeyFiles(tmp_path)
    current, following = keys.current(), keys.next()
    assert current != following
    assert keys.candidates() == [following, current]
    keys.promote(current)
    assert keys.candidates() == [following, current]
    keys.promote(following)
    assert keys.candidates() == [following]
    keys.promote(following)
    assert keys.candidates() == [following]


def test_a_key_file_is_what_other_programs_read_and_write(tmp_path: Path) -> None:
    ours = KeyFiles(tmp_path).current()
    theirs = load_pem_private_key((tmp_path / FILE_NAME).read_bytes(), password=None)
    assert isinstance(theirs, Ed25519PrivateKey)
    assert to_base64url(theirs.public_key().public_bytes_raw()) == ours.public_key
    assert to_base64url(theirs.sign(b"a message")) == ours.sign(b"a message")
    other = Ed25519PrivateKey.generate()
    pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert ClientKey.from_pem(pem).to_pem() == pem
    assert is_signed(
        to_base64url(other.public_key().public_bytes_raw()),
        ClientKey.from_pem(pem).sign(b"a message"),
        b"a message",
    )


def encrypted() -> bytes:
    key = X25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))


def of_another_kind() -> bytes:
    key = X25519PrivateKey.generate()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


WHOLE = ClientKey.make().to_pem()
DAMAGES = {
    "empty": b"",
    "noise": bytes(range(256)),
    "cut": WHOLE[:60],
    "a line more": WHOLE + b"\n",
    "two keys": WHOLE * 2,
    "the bare secret": b"".join(WHOLE.splitlines()[1:2]),
    "a character of no alphabet": WHOLE.replace(b"MC4", b"MC4!"),
    "encrypted": encrypted(),
    "another kind": of_another_kind(),
}


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_key_is_set_aside_and_told(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert KeyFiles(tmp_path).candidates() == []
    assert "damaged" in caplog.text
    assert (tmp_path / "damaged" / FILE_NAME).read_bytes() == content
    assert KeyFiles(tmp_path).current() == KeyFiles(tmp_path).current()


def test_a_directory_in_the_place_of_a_key_blocks_nothing(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME / "somebody's").mkdir(parents=True)
    assert KeyFiles(tmp_path).current() == KeyFiles(tmp_path).current()


def test_nothing_of_a_key_is_left_when_it_is_forgotten(tmp_path: Path) -> None:
    keys = KeyFiles(tmp_path)
    keys.current()
    keys.next()
    for name in (FILE_NAME, NEXT_NAME):  # what a process that was killed left half written
        (tmp_path / f"{name}.new").write_bytes(b"half")
    keys.forget()
    keys.forget()
    assert list(tmp_path.iterdir()) == []


def test_a_key_has_an_age(tmp_path: Path) -> None:
    keys = KeyFiles(tmp_path)
    assert keys.age_s == 0.0
    keys.current()
    os.utime(tmp_path / FILE_NAME, (1.0, 1.0))
    assert keys.age_s > 10**9
    keys.promote(keys.next())
    assert keys.age_s < 10**6


def test_a_pin_holds_one_authority(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tls_front(tmp_path / "tls", target_port=1) as front:
        pem = front.ca_file.read_text(encoding="ascii")
    ca_sha256 = certificate_sha256(pem)
    pin = Pin(tmp_path / "pin")
    assert pin.find(ca_sha256) is None
    pin.keep(pem)
    assert pin.find(ca_sha256) == tmp_path / "pin" / "authority.pem"
    assert caplog.text == ""
    assert pin.find("cd" * 32) is None
    assert pin.find(ca_sha256) is not None, "a pin is not lost to a wrong fingerprint"
    for damage in (b"", pem.encode() * 2, b"\xff", pem.encode()[:200]):
        (tmp_path / "pin" / "authority.pem").write_bytes(damage)
        assert pin.find(ca_sha256) is None
    pin.keep(pem)
    pin.forget()
    assert pin.find(ca_sha256) is None


def test_the_pin_is_trusted_only_over_tls_and_where_the_site_names_no_other(tmp_path: Path) -> None:
    with tls_front(tmp_path / "tls", target_port=1) as front:
        pem = front.ca_file.read_text(encoding="ascii")
    ca_sha256 = certificate_sha256(pem)
    membership = Membership(tmp_path, SERVER)
    assert membership.link(Link(), ca_sha256) == Link()
    membership.pin.keep(pem)
    pinned = Link(ca_file=str(tmp_path / "authority.pem"), is_pinned=True)
    assert membership.link(Link(), ca_sha256) == pinned
    assert membership.link(Link(), None) == Link()
    assert membership.link(Link(ca_file="plant.pem"), ca_sha256) == Link(ca_file="plant.pem")
    assert Membership(tmp_path, "http://127.0.0.1").link(Link(), ca_sha256) == Link()


def test_an_identity_without_its_key_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    membership = Membership(tmp_path, SERVER)
    identity = Identity(ClientId("c7"), "ab" * 32)
    membership.keys.current()
    membership.identity_file.save(identity)
    assert membership.load() == identity
    membership.keys.forget()
    assert membership.load() is None
    assert "lost its key" in caplog.text
    assert membership.identity_file.former_client_id() == "c7"


def test_a_key_outlives_a_damaged_identity(tmp_path: Path) -> None:
    membership = Membership(tmp_path, SERVER)
    key = membership.keys.current()
    (tmp_path / "identity.json").write_bytes(b"{")
    assert membership.load() is None
    assert membership.keys.candidates() == [key]


def test_forgetting_leaves_no_secret_behind(tmp_path: Path) -> None:
    membership = Membership(tmp_path, SERVER)
    membership.keys.current()
    membership.identity_file.save(Identity(ClientId("c7"), "ab" * 32))
    membership.pin.keep("any text")
    (tmp_path / "outbox").mkdir()
    membership.forget()
    membership.forget()
    assert [path.name for path in tmp_path.iterdir()] == ["outbox"]
