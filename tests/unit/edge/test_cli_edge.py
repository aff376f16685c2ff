"""The command line, run as a real process: what it prints and how it exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedra_edge.config import load_config
from fedra_edge.console import Output, ProgressLines
from fedra_edge.errors import (
    BackendUnavailableError,
    ClientRevokedError,
    ConfigurationError,
    DataError,
    FedraEdgeError,
    JoinRefusedError,
    ServerUnreachableError,
    StorageFullError,
    UntrustedServerError,
    WrongServerError,
)
from fedra_edge.exit_codes import ExitCode, exit_code_of
from fedra_edge.membership import Membership
from fedra_edge.progress import ClientProgress, Phase
from fedra_edge.protocol.problems import Problem, ProblemCode
from fedra_edge.protocol.version import PROTOCOL_VERSION
from fedra_server.config import ServerConfig
from tests.support.edge_site import eventually
from tests.support.gate import make_member
from tests.support.headquarters import Headquarters, headquarters, home_in
from tests.support.wire_server import unused_port

ROOT = Path(__file__).parents[3]
PROBLEM = Problem.of(ProblemCode.CLIENT_REVOKED, status=403, detail="over")
COMMANDS = ("join", "profile", "status", "rotate-key", "leave", "evaluate", "predict", "version")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("FEDRA_")},
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
}


def fedra_edge(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [sys.executable, "-m", "fedra_edge", *map(str, arguments)]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, env=ENVIRONMENT
    )


@pytest.fixture(scope="module")
def hq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Headquarters]:
    config = ServerConfig(max_enrolments_per_minute=10_000)
    with headquarters(home_in(tmp_path_factory.mktemp("hq")), config) as running:
        yield running


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A handful of images of two classes."""
    for label in ("zero", "one"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((8, 8), number * 20, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    return tmp_path / "images"


def be_member(home: Path, server: str) -> None:
    make_member(load_config({"server": server, "home": home}), "stranger")


def test_the_version_is_told_as_json() -> None:
    done = fedra_edge("version", "--json")
    assert done.returncode == ExitCode.OK
    told = json.loads(done.stdout)
    assert told["protocol"] == PROTOCOL_VERSION
    assert "torch" in told["backends"]


def test_every_command_has_help_with_an_example() -> None:
    listed = fedra_edge("--help").stdout
    assert "Exit codes" in listed
    for command in COMMANDS:
        assert command in listed
    assert "Example: fedra-edge join" in listed
    for command in COMMANDS:
        told = fedra_edge(command, "--help").stdout
        assert f"Example: fedra-edge {command}" in told
        assert "disk refused" in told


def test_wrong_usage_is_2() -> None:
    assert fedra_edge("join", "--no-such-option").returncode == ExitCode.USAGE
    assert fedra_edge("evaluate").returncode == ExitCode.USAGE
    done = fedra_edge("join", "--data", "x")
    assert done.returncode == ExitCode.USAGE
    assert "--server" in done.stderr


def test_accuracy_is_told_as_a_percentage(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).show({"accuracy": 2 / 3, "mean_loss": 0.5})
    Output(as_json=True).show({"accuracy": 0.5})
    assert capsys.readouterr().out.splitlines() == [
        "accuracy   66.7%", "mean loss  0.5", '{"accuracy": 0.5}',
    ]  # fmt: skip


def test_https_to_a_server_of_plain_http_says_so(hq: Headquarters, tmp_path: Path) -> None:
    server = hq.url.replace("http://", "https://")
    be_member(tmp_path, server)
    done = fedra_edge("status", "--home", tmp_path)
    assert done.returncode == ExitCode.UNREACHABLE
    assert "seems to speak plain http" in done.stderr


def test_http_to_a_server_of_tls_says_so(tmp_path: Path) -> None:
    config = ServerConfig(tls="on", enrolment="token")
    with headquarters(home_in(tmp_path / "hq"), config) as secured:
        server = secured.url.replace("https://", "http://")
        done = fedra_edge("profile", "--server", server, "--home", tmp_path / "home")
    assert done.returncode == ExitCode.UNREACHABLE
    assert "This server speaks https only" in done.stderr
    assert "try https://" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["join", "--server", "plant", "--data", "x"], "no server address"),
        (["join", "--server", "https://plant"], "no local data"),
        (["join", "--server", "https://plant"], "--data"),
        (["join", "--server", "http://plant", "--data", "x"], "--insecure-http"),
        (["join", "--server", "https://plant#half-a-join-string", "--data", "x"], "complete join"),
        (["status"], "no client is enrolled"),
        (["rotate-key"], "no client is enrolled"),
    ],
)
def test_a_configuration_that_cannot_work_is_3(
    arguments: list[str], complaint: str, tmp_path: Path
) -> None:
    done = fedra_edge(*arguments, "--home", tmp_path)
    assert done.returncode == ExitCode.CONFIGURATION
    assert complaint in done.stderr
    assert "try: " in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_are_json_where_json_was_asked_for(tmp_path: Path) -> None:
    done = fedra_edge("status", "--home", tmp_path, "--json")
    told = json.loads(done.stdout)
    assert (told["event"], told["code"]) == ("error", ExitCode.CONFIGURATION)
    assert told["remedy"]


def test_data_that_does_not_exist_is_4(tmp_path: Path) -> None:
    server = f"http://127.0.0.1:{unused_port()}"
    done = fedra_edge("join", "--server", server, "--data", tmp_path / "no", "--home", tmp_path)
    assert done.returncode == ExitCode.DATA
    assert "does not exist" in done.stderr


def test_a_server_that_is_not_there_is_5_and_the_identity_stays(tmp_path: Path) -> None:
    server = f"http://127.0.0.1:{unused_port()}"
    be_member(tmp_path, server)
    assert fedra_edge("status", "--home", tmp_path).returncode == ExitCode.UNREACHABLE
    assert fedra_edge("leave", "--home", tmp_path).returncode == ExitCode.UNREACHABLE
    forgotten = fedra_edge("leave", "--home", tmp_path, "--forget")
    assert forgotten.returncode == ExitCode.OK
    assert "told       no\n" in forgotten.stdout
    assert "the server was not told" in forgotten.stdout
    assert fedra_edge("leave", "--home", tmp_path).returncode == ExitCode.CONFIGURATION


@pytest.mark.parametrize("way", [[], ["--server", "https://plant.example"]])
def test_leaving_by_force_may_be_repeated_where_nothing_is(tmp_path: Path, way: list[str]) -> None:
    home = tmp_path / "home"
    done = fedra_edge("leave", "--forget", "--home", home, "--json", *way)
    assert done.returncode == ExitCode.OK, done.stderr
    told = json.loads(done.stdout)
    assert (told["told"], told["detail"]) == (False, "no client was enrolled here")
    assert not home.exists()


def test_leaving_by_force_clears_what_a_failed_join_has_kept(tmp_path: Path) -> None:
    membership = Membership.of(load_config({"server": "https://plant.example", "home": tmp_path}))
    membership.keys.current()
    membership.pin.keep("left over")
    way = ("--home", tmp_path, "--server", "https://plant.example")
    assert fedra_edge("leave", "--forget", *way).returncode == ExitCode.OK
    assert list(membership.directory.iterdir()) == []


def test_who_headquarters_had_removed_leaves_without_force(
    hq: Headquarters, tmp_path: Path
) -> None:
    be_member(tmp_path, hq.url)
    done = fedra_edge("leave", "--home", tmp_path, "--json")
    assert done.returncode == ExitCode.OK, done.stderr
    told = json.loads(done.stdout)
    assert told["told"] is False
    assert "headquarters had ended the membership before" in told["detail"]


def test_a_client_of_no_run_works_for_any(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).show({"run": None, "is_online": True, "open_assignment": None})
    assert capsys.readouterr().out.splitlines() == [
        "run              any", "is online        yes", "open assignment  none",
    ]  # fmt: skip


def test_a_stranger_is_6_until_one_leaves(hq: Headquarters, tmp_path: Path) -> None:
    be_member(tmp_path, hq.url)
    done = fedra_edge("status", "--home", tmp_path)
    assert done.returncode == ExitCode.REFUSED
    assert "fedra-edge leave" in done.stderr
    assert fedra_edge("leave", "--home", tmp_path).returncode == ExitCode.OK


def test_a_home_that_cannot_be_written_is_8(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    server = f"http://127.0.0.1:{unused_port()}"
    home = tmp_path / "file" / "home"
    done = fedra_edge("join", "--server", server, "--data", images, "--home", home)
    assert done.returncode == ExitCode.STORAGE


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("x"), ExitCode.CONFIGURATION),
        (DataError("x"), ExitCode.DATA),
        (ServerUnreachableError("x"), ExitCode.UNREACHABLE),
        (UntrustedServerError("x"), ExitCode.UNREACHABLE),
        (WrongServerError("x"), ExitCode.WRONG_SERVER),
        (ClientRevokedError(PROBLEM), ExitCode.REVOKED),
        (JoinRefusedError(PROBLEM), ExitCode.REFUSED),
        (BackendUnavailableError("x"), ExitCode.BACKEND),
        (StorageFullError("x"), ExitCode.STORAGE),
        (FedraEdgeError("x"), ExitCode.UNEXPECTED),
        (RuntimeError("x"), ExitCode.UNEXPECTED),
    ],
)
def test_every_kind_of_error_has_its_code(error: Exception, code: ExitCode) -> None:
    assert exit_code_of(error) is code


@pytest.mark.slow
def test_the_profile_is_told_with_the_server_as_json(hq: Headquarters, tmp_path: Path) -> None:
    done = fedra_edge(
        "profile", "--server", hq.url, "--home", tmp_path, "--memory", "1GB", "--json"
    )
    assert done.returncode == ExitCode.OK, done.stderr
    told = json.loads(done.stdout)
    assert told["backend"] == "torch"
    assert told["memory_bytes"] <= 10**9
    assert told["server"]["status"] == "ok"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("told_by", [signal.SIGINT, signal.SIGTERM])
def test_join_ends_well_when_told_and_says_so_to_the_server(
    hq: Headquarters, images: Path, tmp_path: Path, told_by: signal.Signals
) -> None:
    home, log = tmp_path / "home", tmp_path / "log"
    arguments = ["--server", hq.url, "--data", str(images), "--home", str(home), "--name", "cli"]
    command = [sys.executable, "-m", "fedra_edge", "join", *arguments, "--json"]
    with log.open("wb") as output:
        client = subprocess.Popen(command, stdout=output, stderr=output, env=ENVIRONMENT)
    try:
        eventually(lambda: '"waiting"' in log.read_text(encoding="utf-8"))
        client.send_signal(told_by)
        assert client.wait(30) == ExitCode.OK
    finally:
        client.kill()
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert events[-1]["phase"] == "stopped"
    known = {record.client_id: record for record in hq.services.store.clients()}
    record = known[events[-1]["client_id"]]
    assert (record.name, record.is_online) == ("cli", False)
    told = json.loads(fedra_edge("status", "--home", home, "--json").stdout)
    assert (told["name"], told["is_online"], told["deltas_waiting"]) == ("cli", False, 0)
    assert fedra_edge("leave", "--home", home).returncode == ExitCode.OK
    assert hq.services.store.client(record.client_id).has_left


def test_steps_are_shown_at_a_readable_pace_and_stages_always() -> None:
    shown: list[ClientProgress] = []
    now = [100.0]
    lines = ProgressLines(shown.append, clock=lambda: now[0])
    lines(ClientProgress(phase=Phase.WAITING))
    for step in range(1, 101):
        now[0] += 0.1
        lines(ClientProgress(phase=Phase.TRAINING, steps_done=step, steps_total=100))
    lines(ClientProgress(phase=Phase.SENDING))
    steps = [progress.steps_done for progress in shown if progress.phase is Phase.TRAINING]
    assert 4 <= len(steps) <= 8
    assert steps[-1] == 100
    assert [shown[0].phase, shown[-1].phase] == [Phase.WAITING, Phase.SENDING]
