"""A delta's digest is trusted while nobody can have changed its file, and no longer."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from fedra_edge.protocol.ids import AssignmentId
from fedra_server.config import ServerHome
from fedra_server.storage.delta_files import DeltaFiles
from tests.support.edge_site import eventually

ONE = AssignmentId("one")
CLAIM = sha256(b"what the sender said").hexdigest()
"""A digest that the bytes do not have, which shows whether they were read."""
CONTENT = b"what is there"
TRUE = sha256(CONTENT).hexdigest()


@pytest.fixture
def now() -> list[float]:
    """A clock that a test sets."""
    return [0.0]


@pytest.fixture
def files(tmp_path: Path, now: list[float]) -> DeltaFiles:
    """One file that was kept under a digest that is not its own."""
    home = ServerHome(tmp_path)
    home.create()
    part = tmp_path / "part"
    part.write_bytes(CONTENT)
    kept = DeltaFiles(home, clock=lambda: now[0])
    kept.keep(part, ONE, CLAIM)
    return kept


def rewrite(path: Path) -> None:
    path.write_bytes(CONTENT)


def rewrite_in_place_and_hide_it(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.write(CONTENT)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_another_there(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(CONTENT)
    other.replace(path)


def test_what_was_digested_a_moment_ago_is_not_read(files: DeltaFiles, now: list[float]) -> None:
    now[0] = 59.0
    assert files.sha256(ONE) == CLAIM


def test_the_digest_is_trusted_once(files: DeltaFiles) -> None:
    assert files.sha256(ONE) == CLAIM
    assert files.sha256(ONE) == TRUE


def test_a_minute_later_the_file_is_read(files: DeltaFiles, now: list[float]) -> None:
    now[0] = 61.0
    assert files.sha256(ONE) == TRUE


@pytest.mark.parametrize("change", [rewrite, rewrite_in_place_and_hide_it, put_another_there])
def test_a_file_that_somebody_touched_is_read(
    files: DeltaFiles, change: Callable[[Path], None]
) -> None:
    path = files.path(ONE)
    before = path.stat().st_ctime_ns

    def is_noticed() -> bool:
        change(path)
        return path.stat().st_ctime_ns > before

    eventually(is_noticed)  # the clock of a file system goes in steps of some milliseconds
    assert files.sha256(ONE) == TRUE


def test_another_process_reads_what_it_did_not_write(files: DeltaFiles, tmp_path: Path) -> None:
    assert files.path(ONE).read_bytes() == CONTENT
    assert DeltaFiles(ServerHome(tmp_path)).sha256(ONE) == TRUE
