"""How a client changes places with the small program that rests for it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedra_edge.client import Resting
from fedra_edge.foreground import resting_of
from fedra_edge.link import Link
from fedra_edge.profiling import SiteCaps
from fedra_edge.resting import CONTRIBUTED, Rest

ROOT = Path(__file__).parents[3]
ANY_BYTES = os.fsdecode(b"data-\xff")
REST = Rest(
    server="http://127.0.0.1:1",
    home=Path("home"),
    membership=Path("home") / "servers" / "one",
    poll_s=25.0,
    caps=SiteCaps(memory_bytes=10**9),
    contributed=3,
    command=("join", "--data", ANY_BYTES),
    link=Link(ca_file="plant.pem", max_bytes_per_s=10**6, idle_s=5.0),
)
WAKE = """
import threading
from pathlib import Path
from fedra_edge.profiling import SiteCaps
from fedra_edge.resting import Rest, wake_up
rest = Rest("http://127.0.0.1:1", Path("."), Path("."), 1.0, SiteCaps(), 0, ("version",))
wake_up(rest, threading.Event())
"""


def test_names_of_files_may_hold_any_bytes() -> None:
    told = REST.to_json()
    assert told.isascii()
    assert Rest.from_json(told) == REST


def test_the_proxy_s_password_is_not_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = "http://plant:secret@proxy:3128"
    told = replace(REST, link=replace(REST.link, proxy=proxy)).to_json()
    assert "secret" not in told
    monkeypatch.setenv("FEDRA_EDGE_PROXY", proxy)
    assert Rest.from_json(told).link.proxy == proxy


def test_the_session_goes_along_unseen_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDRA_EDGE_RESTING_SESSION", raising=False)
    rest = replace(REST, session="nobody-else-s")
    assert "nobody-else-s" not in rest.to_json() + repr(rest)
    assert Rest.from_json(rest.to_json()).session is None
    rest.hand_over()
    assert Rest.from_json(rest.to_json()) == rest
    assert Rest.from_json(rest.to_json()).session is None
    rest.hand_over()
    told = resting_of(["join"], 0)
    assert told is not None
    assert told.session == "nobody-else-s"
    assert "nobody-else-s" not in repr(told)
    assert resting_of(["join"], 0) == Resting(("join",), 0)


@pytest.mark.parametrize("form", [["--server", "{}"], ["--server={}"]])
def test_a_join_string_is_carried_along_without_its_secret(form: list[str]) -> None:
    fingerprint = "ab" * 32
    typed = [part.format(f"https://hq.example:8470/a=b#t1-secret.{fingerprint}") for part in form]
    told = resting_of(["join", "--data", "a#b", *typed, "--name", "x"], 0)
    bare = [part.format("https://hq.example:8470/a=b") for part in form]
    assert told == Resting(("join", "--data", "a#b", *bare, "--name", "x"), 0)


def test_a_resting_client_needs_no_library_for_signing() -> None:
    script = "import sys, fedra_edge.resting; print({'nacl', 'cryptography'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, encoding="utf-8"
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("added", [[], [CONTRIBUTED, "7"]])
def test_what_a_rest_added_is_taken_out_again(added: list[str]) -> None:
    arguments = ["join", *added, "--server", "https://plant", "--"]
    assert resting_of(arguments, 7) == Resting(("join", "--server", "https://plant", "--"), 7)


def test_a_command_that_cannot_be_carried_along_never_rests() -> None:
    assert resting_of(["join", "--name", "x" * 2**17], 0) is None


@pytest.mark.skipif(os.name != "posix", reason="only there can a process change its program")
def test_programs_in_the_working_directory_are_not_run(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("open('trapped', 'w').close()", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-P", "-c", WAKE],
        check=False,
        capture_output=True,
        cwd=tmp_path,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert f"No such option: {CONTRIBUTED}" in done.stderr  # so the command line did run
    assert not (tmp_path / "trapped").exists()
