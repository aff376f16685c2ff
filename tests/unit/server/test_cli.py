"""The operator's commands: what they tell, what they change, and the codes they end with."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.models import ModelSpec, Piece
from fedra_edge.protocol.tensors import serialize_tensors
from fedra_server.cli import main
from fedra_server.cli.app import app
from fedra_server.cli.output import format_bytes, format_layers
from fedra_server.config import ServerHome
from fedra_server.errors import NotPermittedError
from fedra_server.exit_codes import ExitCode, exit_code_of
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.builders import (
    make_assignment,
    make_calibration,
    make_client,
    make_digest,
    make_evaluation,
    make_model_spec,
    make_round,
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:  # noqa: ANN401 (any document)
        return json.loads(self.out)


Command = Callable[..., Outcome]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerHome:
    path = tmp_path / "home"
    monkeypatch.setenv("FEDRA_SERVER_HOME", str(path))
    return ServerHome(path)


@pytest.fixture
def command(home: ServerHome, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line on the test's home."""
    assert not home.path.exists()

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), printed.out, printed.err)

    return run


@contextmanager
def opened(home: ServerHome) -> Iterator[Store]:
    with closing(Store.open(home.path)) as store:
        yield store


@pytest.fixture
def model(command: Command, home: ServerHome) -> ModelSpec:
    """Initialise the home and register a tiny model."""
    assert command("init").code == 0
    spec = make_model_spec()
    shapes = spec.head_parameters.items()
    tensors = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes}
    weights = BlobStore(home.blobs).put_bytes(serialize_tensors(tensors))
    spec = spec.model_copy(update={"head": Piece(weights=weights, cost=spec.head.cost)})
    with opened(home) as store:
        store.add_model(spec, 1.0)
    return spec


def test_init_makes_a_home_once_and_keeps_what_is_there(command: Command, home: ServerHome) -> None:
    first = command("init", "--json")
    assert (first.code, first.json["new"]) == (0, True)
    home.config_file.write_text("port = 1234\n", encoding="utf-8")
    second = command("init", "--json")
    assert second.json == {
        "home": str(home.path),
        "config_file": str(home.config_file),
        "new": False,
        "ca_sha256": first.json["ca_sha256"],
    }
    assert home.config_file.read_text(encoding="utf-8") == "port = 1234\n"
    assert {"blobs", "uploads", "deltas", "fedra.sqlite3"} <= {
        it.name for it in home.path.iterdir()
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["model", "list"],
        ["run", "list"],
        ["client", "list"],
        ["export", "--run", "digits", "--out", "out"],
    ],
)
def test_a_home_that_was_never_made_is_a_configuration_error(
    command: Command, home: ServerHome, arguments: Sequence[str]
) -> None:
    outcome = command(*arguments)
    assert outcome.code == ExitCode.CONFIGURATION
    assert outcome.err.startswith("error: there is no server home")
    assert f"fedra-server init --home {home.path}" in outcome.err
    assert not home.path.exists()


def test_a_home_that_cannot_be_made_is_a_storage_error(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = command("init", "--home", str(tmp_path / "file" / "home"))
    assert outcome.code == ExitCode.STORAGE
    assert "Traceback" not in outcome.err


def test_a_setting_that_cannot_work_is_a_configuration_error(
    command: Command, home: ServerHome
) -> None:
    assert command("init").code == 0
    home.config_file.write_text("port = true\nprot = 1\n", encoding="utf-8")
    outcome = command("serve")
    assert outcome.code == ExitCode.CONFIGURATION
    assert "prot" in outcome.err


def test_a_run_is_created_with_the_defaults_of_the_paper(
    command: Command, home: ServerHome, model: ModelSpec
) -> None:
    created = command("run", "create", "digits", "--model", "tiny", "--json").json
    assert (created["run"], created["model"], created["state"]) == ("digits", "tiny", "created")
    spec = created["spec"]
    assert spec["adapter"] == {"rank": 8, "alpha": 8.0, "targets": [*model.default_targets]}
    assert spec["training"]["learning_rate"] == 0.01
    with opened(home) as store:
        assert store.revision("digits").manifest.number == 0
        assert store.run("digits").spec.model_dump(mode="json") == spec
    assert command("run", "list", "--json").json == {"runs": [created]}


def test_every_option_of_a_run_is_taken(command: Command, model: ModelSpec) -> None:
    options = {
        "rounds": 7,
        "min-participants": 6,
        "deadline-s": 90.5,
        "depth": "reduced",
        "allocation": "balanced",
        "merge-weighting": "uniform",
        "max-inverse-chance": 2.0,
        "max-layers": 2,
        "seed": 5,
        "mode": "buffered",
        "buffer-size": 5,
        "max-staleness": 4,
        "staleness-exponent": 0.25,
        "cohort-size": 6,
        "over-provisioning": 0.5,
        "merge": "trimmed-mean",
        "trim-fraction": 0.4,
    }
    screening = {
        "clip-factor": 4.0, "quarantine-factor": 9.0, "cosine-floor": -0.5,
        "examples-factor": 5.0,
    }  # fmt: skip
    server = {"learning-rate": 0.5, "momentum": 0.75, "beta2": 0.5, "tau": 0.125}
    training = {
        "optimizer": "adamw", "learning-rate": 0.5, "momentum": 0.25, "weight-decay": 0.125,
        "clip-norm": 1.5, "batch-size": 4, "local-epochs": 2, "max-steps": 9,
    }  # fmt: skip
    adapter = {"rank": 2, "alpha": 3.0}
    flags = [
        f"--{key}={value}" for key, value in (options | screening | training | adapter).items()
    ]
    flags += [
        f"--server-{key}={value}" for key, value in {"optimizer": "fedyogi", **server}.items()
    ]
    flags += ["--tolerate=2", "--screening"]
    names = ["--target", model.default_targets[1], "--target", model.default_targets[0]]
    arguments = ["digits", "--model", "tiny", *flags, *names, "--start", "--json"]
    created = command("run", "create", *arguments).json
    assert created["state"] == "running"

    def fields(values: dict[str, Any]) -> dict[str, Any]:
        return {key.replace("-", "_"): value for key, value in values.items()}

    targets = list(reversed(model.default_targets))
    assert created["spec"] == {
        **fields(options),
        "tolerated_attackers": 2,
        "screening": {"enabled": True, **fields(screening)},
        "training": fields(training),
        "adapter": {**adapter, "targets": targets},
        "server_optimizer": {"kind": "fedyogi", **fields(server)},
        "graphs": None,
    }


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["digits"], ExitCode.USAGE, "--model"),
        (["digits", "--model", "huge"], ExitCode.NOT_FOUND, "model list"),
        (["dig its", "--model", "tiny"], ExitCode.USAGE, "no name"),
        (["digits", "--model", "tiny", "--rounds", "0"], ExitCode.USAGE, "rounds"),
        (["digits", "--model", "tiny", "--rank", "many"], ExitCode.USAGE, "rank"),
        (["digits", "--model", "tiny", "--depth", "deep"], ExitCode.USAGE, "depth"),
        (["digits", "--model", "tiny", "--learning-rate", "nan"], ExitCode.USAGE, "learning_rate"),
        (["digits", "--model", "tiny", "--cohort-size", "1"], ExitCode.USAGE, "--min-participants"),
        (
            ["digits", "--model", "tiny", "--over-provisioning", "1"],
            ExitCode.USAGE,
            "--cohort-size",
        ),
        (["digits", "--model", "tiny", "--buffer-size", "4"], ExitCode.USAGE, "--mode buffered"),
        (["digits", "--model", "tiny", "--server-tau", "0.1"], ExitCode.USAGE, "fedyogi"),
        (["digits", "--model", "tiny", "--target", "fc2"], ExitCode.CONFIGURATION, "mlp.fc2"),
        (["digits", "--model", "tiny", "--max-layers", "99"], ExitCode.CONFIGURATION, "4 layers"),
        (["taken", "--model", "tiny"], ExitCode.CONFLICT, "exists already"),
    ],
)
def test_a_run_that_cannot_be_created_says_why(
    command: Command, arguments: Sequence[str], code: ExitCode, told: str
) -> None:
    assert command("run", "create", "taken", "--model", "tiny").code == 0
    outcome = command("run", "create", *arguments)
    assert outcome.code == code
    assert told in outcome.err
    assert "Traceback" not in outcome.err
    assert len(command("run", "list", "--json").json["runs"]) == 1


@pytest.mark.usefixtures("model")
def test_a_run_is_started_paused_and_stopped(command: Command) -> None:
    command("run", "create", "digits", "--model", "tiny")
    steps = ["start", "pause", "start", "stop"]
    states = [command("run", step, "digits", "--json").json["state"] for step in steps]
    assert states == ["running", "paused", "running", "stopped"]
    for step in ("start", "pause", "stop"):
        outcome = command("run", step, "digits")
        assert (outcome.code, "is stopped" in outcome.err) == (ExitCode.CONFLICT, True)
    assert command("run", "start", "other").code == ExitCode.NOT_FOUND
    assert command("run", "status", "other").code == ExitCode.NOT_FOUND


@pytest.mark.usefixtures("model")
def test_status_shows_the_round_and_the_accuracy(command: Command, home: ServerHome) -> None:
    command("run", "create", "digits", "--model", "tiny", "--start")
    with opened(home) as store:
        store.add_client(make_client(name="Plant Nord"), make_digest("secret"))
        work = make_assignment(run="digits", predicted_peak_bytes=450_000_000)
        store.open_round(make_round(run="digits"), [work])
        store.add_evaluation(ClientId("client-1"), make_evaluation(run="digits"))
    report = command("run", "status", "digits", "--json").json
    assert report["round"]["participants"][0]["trained_layer_ids"] == [1, 3]
    assert report["accuracy"][0]["pooled"]["accuracy"] == 0.5
    text = command("run", "status", "digits").out
    for told in ("Plant Nord", "1,3", "450.0 MB", "50.0%", "Coverage per layer: 0 0 0 0"):
        assert told in text


@pytest.mark.usefixtures("model")
def test_status_shows_what_a_run_waits_for(command: Command, home: ServerHome) -> None:
    told = command("run", "create", "digits", "--model", "tiny").out
    assert "fedra-server run start digits`" in told
    assert "waits" not in command("run", "status", "digits").out
    command("run", "start", "digits")
    assert command("run", "start", "digits").err == "error: run 'digits' is running already\n"
    now = time.time()
    with opened(home) as store:
        store.add_client(replace(make_client("a"), last_seen_at=now), make_digest("a"))
        store.add_client(replace(make_client("b"), last_seen_at=now), make_digest("b"))
        store.add_client(make_client("silent"), make_digest("silent"))
        store.set_calibration(ClientId("a"), make_calibration(store.models()[0].spec))
    waiting = command("run", "status", "digits", "--json").json["waiting"]
    assert {it["name"]: it["reason"] for it in waiting} == {
        "plant a": "ready",
        "plant b": "not calibrated yet",
    }
    text = command("run", "status", "digits").out
    assert "waits for participants: 1 of 2 ready\n" in text
    assert "not calibrated yet" in text


@pytest.mark.usefixtures("model")
def test_a_stopped_runs_last_round_is_not_shown_as_open(command: Command, home: ServerHome) -> None:
    command("run", "create", "digits", "--model", "tiny", "--start")
    with opened(home) as store:
        store.add_client(make_client(), make_digest("secret"))
        store.open_round(make_round(run="digits"), [make_assignment(run="digits")])
    assert "Round 1, open until" in command("run", "status", "digits").out
    command("run", "stop", "digits")
    assert "Round 1, ended unpublished" in command("run", "status", "digits").out


def test_clients_are_listed_with_their_state(command: Command, home: ServerHome) -> None:
    assert command("init").code == 0
    assert "No clients yet" in command("client", "list").out
    now = time.time()
    with opened(home) as store:
        for name, seen_at in (("here", now), ("silent", now - 3_600), ("gone", now)):
            client = replace(make_client(name), last_seen_at=seen_at)
            store.add_client(client, make_digest(name))
        store.leave(ClientId("gone"), now)
    listed = command("client", "list", "--all", "--json").json["clients"]
    states = {it["client_id"]: it["state"] for it in listed}
    assert states == {"here": "online", "silent": "offline", "gone": "left"}
    assert listed[0]["profile"]["memory_bytes"] == 4 * 2**30
    text = command("client", "list").out
    assert "silent" in text
    assert "gone" not in text


def test_models_are_listed(command: Command, model: ModelSpec) -> None:
    [listed] = command("model", "list", "--json").json["models"]
    assert (listed["name"], listed["num_layers"]) == ("tiny", 4)
    assert "tiny" in command("model", "list").out
    assert command("model", "show", "tiny", "--json").json == listed
    assert ModelSpec.model_validate_json(command("model", "show", "tiny", "--spec").out) == model
    assert command("model", "show", "absent").code == ExitCode.NOT_FOUND


@pytest.mark.usefixtures("model")
def test_an_export_needs_a_run_and_a_revision_that_exist(command: Command, tmp_path: Path) -> None:
    command("run", "create", "digits", "--model", "tiny")
    out = str(tmp_path / "out")
    for arguments in (["--run", "other"], ["--run", "digits", "--revision", "3"]):
        assert command("export", *arguments, "--out", out).code == ExitCode.NOT_FOUND
    assert not Path(out).exists()


def test_adding_a_model_without_torch_tells_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from fedra_server.cli import main\n"
        "main(sys.argv[1:])"
    )
    home = ["--home", str(tmp_path / "home")]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command_line = [sys.executable, "-c", program, *arguments, *home]
        return subprocess.run(command_line, check=False, capture_output=True, text=True)

    assert run("init").returncode == 0
    outcome = run("model", "add", "vit", str(tmp_path))
    assert outcome.returncode == ExitCode.CONFIGURATION, outcome.stderr
    assert 'pip install "fedra[modelbook,server]"' in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_version_tells_the_protocol(command: Command) -> None:
    assert command("version", "--json").json["protocol"] == "2.0"
    assert command("version").out.startswith("fedra-server ")


def every_command() -> list[list[str]]:
    tree: Any = get_command(app)
    groups = {name: getattr(it, "commands", None) for name, it in tree.commands.items()}
    alone = [[name] for name, members in groups.items() if members is None]
    return alone + [[name, it] for name, members in groups.items() if members for it in members]


def test_all_commands_are_there() -> None:
    assert {" ".join(path) for path in every_command()} == {
        "init", "serve", "export", "disk", "prune", "version",
        "model add", "model list", "model show",
        "run create", "run start", "run pause", "run stop", "run status", "run list", "run plan",
        "audit check", "audit log", "operator add", "operator list", "operator remove",
        "client list", "client remove", "token create", "token list", "token revoke",
        "quarantine list", "quarantine show", "quarantine release", "quarantine discard",
    }  # fmt: skip


@pytest.mark.parametrize("path", every_command(), ids=" ".join)
def test_every_help_has_an_example_and_the_exit_codes(command: Command, path: list[str]) -> None:
    outcome = command(*path, "--help")
    assert outcome.code == 0
    assert f"Example: fedra-server {' '.join(path)}" in outcome.out
    for code in ExitCode:
        assert f"{code.value} " in outcome.out.partition("Exit codes:")[2]


@pytest.mark.parametrize("path", [[], ["model"], ["run"], ["client"], ["token"]], ids=" ".join)
def test_every_group_has_them_too_and_its_list_is_not_cut(
    command: Command, path: list[str]
) -> None:
    outcome = command(*path, "--help")
    assert " ".join(["Example: fedra-server", *path]) in outcome.out
    assert "Exit codes:" in outcome.out
    assert "..." not in outcome.out.partition("Commands:")[2]


def test_serving_tells_its_defaults(command: Command) -> None:
    told = command("serve", "--help").out
    assert "127.0.0.1" in told
    assert "8470 unless" in told.replace("\n", " ")


def test_wrong_usage_has_a_code_of_its_own(command: Command) -> None:
    assert command("run", "fly").code == ExitCode.USAGE
    assert command("serve", "--port", "70000").code == ExitCode.USAGE


def test_an_error_without_a_code_is_unexpected() -> None:
    assert exit_code_of(NotPermittedError("no")) is ExitCode.UNEXPECTED


def test_numbers_are_written_for_people() -> None:
    sizes = (0, 999, 1_000, 1_536_000, 2 * 10**9, 5 * 10**15)
    assert [format_bytes(it) for it in sizes] == [
        "0 B", "999 B", "1.0 KB", "1.5 MB", "2.0 GB", "5000.0 TB",
    ]  # fmt: skip
    assert format_layers([]) == ""
    assert format_layers([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
