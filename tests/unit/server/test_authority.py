"""The authority of a home: made once, kept private, and certificates that come and go below it."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from fedra_edge.protocol.trust import certificate_sha256
from fedra_server.authority import (
    AuthorityFiles,
    certificate_names,
    ensure_authority,
    refresh_certificate,
)
from fedra_server.config import ServerHome
from fedra_server.errors import ConfigurationError
from fedra_server.issuing import issue_if_due

NAMES = ("hq.example", "10.0.0.5", "::1")
LIFE = timedelta(days=90)
NOW = datetime.now(UTC)
ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    made = ServerHome(tmp_path / "home")
    made.create()
    return made


def certificates(path: Path) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(path.read_bytes())


def handshake(server_pem: Path, ca_pem: Path, name: str) -> None:
    """Let a client that trusts the authority meet a server that shows the chain, in memory."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(server_pem)
    client_context = ssl.create_default_context(cafile=ca_pem)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert client.version() in {"TLSv1.2", "TLSv1.3"}


def test_an_authority_is_made_once_and_named_by_its_digest(home: ServerHome) -> None:
    authority = ensure_authority(home)
    assert authority == ensure_authority(home)
    assert authority.ca_sha256 == certificate_sha256(authority.ca_pem)
    [certificate] = certificates(AuthorityFiles.of(home).certificate)
    assert certificate.not_valid_after_utc > NOW + timedelta(days=3600)
    assert certificate.not_valid_before_utc < NOW - timedelta(hours=1)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
def test_keys_are_for_their_owner_only(home: ServerHome) -> None:
    ensure_authority(home)
    refresh_certificate(home, NAMES, LIFE, NOW)
    files = AuthorityFiles.of(home)
    for path in (files.key, files.server):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(files.directory.stat().st_mode) == 0o700


def test_processes_that_make_an_authority_at_once_agree(home: ServerHome) -> None:
    code = (
        "import sys; from pathlib import Path; from fedra_server.config import ServerHome; "
        "from fedra_server.authority import ensure_authority; "
        "print(ensure_authority(ServerHome(Path(sys.argv[1]))).ca_sha256)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(home.path)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    told = {process.communicate(timeout=60)[0] for process in started}
    assert told == {f"{ensure_authority(home).ca_sha256}\n"}
    assert not list(home.path.glob(".authority*"))


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_trusts_the_authority_believes_each_name(home: ServerHome, name: str) -> None:
    ensure_authority(home)
    path = refresh_certificate(home, NAMES, LIFE, NOW)
    handshake(path, AuthorityFiles.of(home).certificate, name)
    with pytest.raises(ssl.SSLCertVerificationError, match="valid for"):
        handshake(path, AuthorityFiles.of(home).certificate, "other.example")


def test_a_certificate_stays_until_a_third_of_its_life_is_left(home: ServerHome) -> None:
    ensure_authority(home)
    path = refresh_certificate(home, NAMES, LIFE, NOW)
    first = path.read_bytes()
    assert certificate_names(home) == set(NAMES)
    refresh_certificate(home, NAMES, LIFE, NOW + LIFE * 0.6)
    assert path.read_bytes() == first
    refresh_certificate(home, NAMES, LIFE, NOW + LIFE * 0.7)
    leaf, authority = certificates(path)
    assert leaf.not_valid_after_utc > NOW + LIFE * 1.6
    assert path.read_bytes() != first
    assert authority == certificates(AuthorityFiles.of(home).certificate)[0]


def test_what_is_wrong_with_a_certificate_makes_a_new_one(home: ServerHome) -> None:
    ensure_authority(home)
    path = refresh_certificate(home, NAMES, LIFE, NOW)
    for spoil in (
        path.unlink,
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(path.read_bytes()[300:]),
        lambda: path.write_bytes(path.read_bytes().replace(b"PRIVATE KEY", b"PUBLIC KEY")),
    ):
        spoil()
        refresh_certificate(home, NAMES, LIFE, NOW)
        handshake(path, AuthorityFiles.of(home).certificate, "hq.example")
    refresh_certificate(home, (*NAMES, "more.example"), LIFE, NOW)
    assert "more.example" in certificate_names(home)
    refresh_certificate(home, NAMES, timedelta(days=1), NOW)
    assert certificates(path)[0].not_valid_after_utc <= NOW + timedelta(days=1)


SPOILT_RECORDS = {
    "none": None,
    "no JSON": "{",
    "another file": '{"file_sha256": "00"}',
    "a number more": '"added": 1, "names":',
    "names as one text": '"names": "hq.example", "were":',
}


@pytest.mark.parametrize("record", SPOILT_RECORDS.values(), ids=SPOILT_RECORDS)
def test_a_certificate_without_a_record_of_it_is_made_anew(
    home: ServerHome, record: str | None
) -> None:
    ensure_authority(home)
    path = refresh_certificate(home, NAMES, LIFE, NOW)
    issued = AuthorityFiles.of(home).issued
    told, first = issued.read_text(encoding="utf-8"), path.read_bytes()
    if record is None:
        issued.unlink()
    else:
        issued.write_text(told.replace('"names":', record) if "names" in record else record)
    assert certificate_names(home) == set()
    refresh_certificate(home, NAMES, LIFE, NOW)
    assert path.read_bytes() != first
    assert certificate_names(home) == set(NAMES)


def test_the_record_says_what_the_certificate_says(home: ServerHome) -> None:
    ensure_authority(home)
    leaf = certificates(refresh_certificate(home, NAMES, LIFE, NOW))[0]
    told = json.loads(AuthorityFiles.of(home).issued.read_bytes())
    assert datetime.fromisoformat(told["valid_from"]) == leaf.not_valid_before_utc
    assert datetime.fromisoformat(told["valid_until"]) == leaf.not_valid_after_utc


def test_a_process_that_serves_does_not_load_the_library(home: ServerHome) -> None:
    """Neither where a certificate is due, which another process issues, nor where one is good."""
    ensure_authority(home)
    code = (
        "import sys; from pathlib import Path; from datetime import timedelta; "
        "from fedra_server.config import ServerHome; from fedra_server.issuing import issue_if_due;"
        "issue_if_due(ServerHome(Path(sys.argv[1])), ['hq.example'], timedelta(days=90)); "
        "print('cryptography' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(home.path)]
    contents = []
    for _ in range(2):
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=60
        )
        assert done.stdout == "False\n"
        contents.append(AuthorityFiles.of(home).server.read_bytes())
    assert contents[0] == contents[1]
    server = AuthorityFiles.of(home).server
    handshake(server, AuthorityFiles.of(home).certificate, "hq.example")


def test_why_no_certificate_can_be_issued_is_told_here(home: ServerHome) -> None:
    ensure_authority(home)
    AuthorityFiles.of(home).key.write_bytes(b"no key")
    with pytest.raises(ConfigurationError, match=r"ca\.key"):
        issue_if_due(home, NAMES, LIFE)


def test_a_certificate_of_another_authority_is_replaced(home: ServerHome, tmp_path: Path) -> None:
    other = ServerHome(tmp_path / "other")
    other.create()
    for each in (home, other):
        ensure_authority(each)
        refresh_certificate(each, NAMES, LIFE, NOW)
    shutil.copy(AuthorityFiles.of(other).server, AuthorityFiles.of(home).server)
    shutil.copy(AuthorityFiles.of(other).issued, AuthorityFiles.of(home).issued)
    path = refresh_certificate(home, NAMES, LIFE, NOW)
    handshake(path, AuthorityFiles.of(home).certificate, "hq.example")


@pytest.mark.parametrize("missing", ["ca.pem", "ca.key"])
def test_a_lost_file_is_never_replaced_silently(home: ServerHome, missing: str) -> None:
    ensure_authority(home)
    (AuthorityFiles.of(home).directory / missing).unlink()
    with pytest.raises(ConfigurationError, match=f"{missing} is missing") as refusal:
        ensure_authority(home)
    assert "backup" in refusal.value.remedy


def test_damage_is_told(home: ServerHome, tmp_path: Path) -> None:
    files = AuthorityFiles.of(home)
    ensure_authority(home)
    pem = files.certificate.read_bytes()
    files.certificate.write_bytes(pem + pem)
    with pytest.raises(ConfigurationError, match="damaged"):
        ensure_authority(home)
    files.certificate.write_bytes(pem)
    key = files.key.read_bytes()
    files.key.write_bytes(b"no key")
    with pytest.raises(ConfigurationError, match=r"ca\.key"):
        refresh_certificate(home, NAMES, LIFE, NOW)
    other = ServerHome(tmp_path / "other")
    other.create()
    ensure_authority(other)
    shutil.copy(AuthorityFiles.of(other).key, files.key)
    with pytest.raises(ConfigurationError, match="not the key"):
        refresh_certificate(home, NAMES, LIFE, NOW)
    assert key != files.key.read_bytes()


def test_a_clock_that_cannot_be_right_is_told(home: ServerHome) -> None:
    ensure_authority(home)
    for wrong in (datetime(1970, 1, 1, tzinfo=UTC), NOW + timedelta(days=4000)):
        with pytest.raises(ConfigurationError, match="clock") as refusal:
            refresh_certificate(home, NAMES, LIFE, wrong)
        assert "Set the clock" in refusal.value.remedy


@pytest.mark.parametrize("name", ["https://hq.example", "hq example", "", "a" * 254, "-x", "x:1"])
def test_a_name_that_is_none_is_refused(home: ServerHome, name: str) -> None:
    ensure_authority(home)
    with pytest.raises(ConfigurationError, match="no host name"):
        refresh_certificate(home, [name], LIFE, NOW)
