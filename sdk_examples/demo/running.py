"""The main job with real processes: one server, six clients, one run, one exported adapter."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedra_edge.protocol.devices import Backend
from fedra_server.reports import ParticipantReport, RunReport
from fedra_server.runs import RunState
from sdk_examples.demo.following import ClientLogs, Standing
from sdk_examples.demo.processes import DemoError, Programs, read_text, run_command
from sdk_examples.demo.sites import Site

SERVER: Final = "fedra_server"
EDGE: Final = "fedra_edge"
MODEL: Final = "vit-digits"
RUN: Final = "handwriting"

_TRAINING: Final = (
    *("--optimizer", "adamw", "--learning-rate", 0.006),
    *("--batch-size", 32, "--local-epochs", 1),
)
_LOOK_S: Final = 0.5
_SERVER_START_S: Final = 60.0
_FIRST_ROUND_S: Final = 180.0
_OVERALL_S: Final = 1200.0

Watch = Callable[[Standing], None]
"""Called twice a second with where the cohort stands."""


@dataclass(frozen=True)
class Budget:
    """What a site lets its client use: layers trained in a round, memory, training runtime.

    ``spare_bytes`` is what the client may occupy beyond its idle training runtime; None for
    whatever the machine has. With 52 MB the model fits in small micro-batches only, with 42 MB
    it does not fit and is streamed through memory block by block.
    """

    max_layers: int
    spare_bytes: int | None = None
    backend: Backend = "torch"


BUDGETS: Final = (
    Budget(12),
    Budget(10),
    Budget(8, backend="onnx"),
    Budget(6, backend="onnx"),
    Budget(4, spare_bytes=52 * 10**6),
    Budget(3, spare_bytes=42 * 10**6),
)
"""The layers are the paper's mix (FedRA, arXiv 2311.11227)."""


@dataclass(frozen=True)
class Outcome:
    """What the run left behind: its report, how each client worked, and the adapter."""

    report: RunReport
    plans: Mapping[str, ParticipantReport]
    export: Path
    tuning_s: float


@dataclass(frozen=True)
class Workplace:
    """Where the demo's programs keep their files."""

    root: Path

    @property
    def server_home(self) -> Path:
        """The server's home."""
        return self.root / "server"

    @property
    def export(self) -> Path:
        """Where the tuned adapter is written."""
        return self.root / "export"

    @property
    def logs(self) -> Path:
        """One log file per program."""
        return self.root / "logs"

    def client_home(self, name: str) -> Path:
        """A client's home."""
        return self.root / "clients" / name


def run_cohort(
    place: Workplace, model: Path, sites: Sequence[Site], rounds: int, watch: Watch
) -> Outcome:
    """Tune the model at all sites together, from an empty server to an exported adapter.

    Raises:
        DemoError: A program failed.
    """
    prepare_server(place, model, rounds, len(sites))
    idle_bytes = _idle_bytes(place)
    started = time.monotonic()
    with Programs(place.logs) as programs:
        programs.start("server", SERVER, "serve", "--home", place.server_home, "--port", 0)
        _wait_for_server(place, programs)
        joining = _join_string(place, len(sites))
        logs = {}
        for site, budget in zip(sites, BUDGETS, strict=True):
            arguments = _join_arguments(place, site, joining, budget, idle_bytes)
            logs[site.name] = programs.start(site.name, EDGE, *arguments)
        followed = ClientLogs(logs, {site.name: site.test_examples for site in sites})
        plans = _follow(place, programs, followed, watch)
    report = read_report(place)
    if report.state is not RunState.FINISHED:
        raise DemoError(f"all clients ended, but the run is {report.state}; see {place.logs}")
    run_command(SERVER, "export", "--run", RUN, "--out", place.export, "--home", place.server_home)
    return Outcome(report, plans, place.export, time.monotonic() - started)


def prepare_server(place: Workplace, model: Path, rounds: int, participants: int) -> None:
    """Make the server's home, register the model and create the run.

    The server speaks TLS, which one that listens on this machine only would not do by itself.
    """
    home = ("--home", place.server_home)
    run_command(SERVER, "init", *home)
    with (place.server_home / "server.toml").open("a", encoding="utf-8") as settings:
        settings.write('tls = "on"\n')
    run_command(SERVER, "model", "add", MODEL, model, *home)
    size = ("--rounds", rounds, "--min-participants", participants)
    run_command(SERVER, "run", "create", RUN, "--model", MODEL, *size, *_TRAINING, "--start", *home)


def read_report(place: Workplace) -> RunReport:
    """Ask the server's records what the run achieved so far."""
    told = run_command(SERVER, "run", "status", RUN, "--json", "--home", place.server_home)
    return RunReport.model_validate_json(told)


def _idle_bytes(place: Workplace) -> int:
    """Ask a client what it occupies with PyTorch loaded and nothing to do."""
    profile = run_command(
        EDGE, "profile", "--backend", "torch", "--json", "--home", place.client_home("profile")
    )
    return int(json.loads(profile)["baseline_bytes"])


def _join_arguments(
    place: Workplace, site: Site, joining: str, budget: Budget, idle_bytes: int
) -> tuple[object, ...]:
    home = place.client_home(site.name)
    arguments: tuple[object, ...] = (
        *("join", "--server", joining, "--run", RUN, "--data", site.directory, "--name", site.name),
        *("--home", home, "--max-layers", budget.max_layers, "--threads", 1, "--json"),
        *("--backend", budget.backend),
    )
    if budget.spare_bytes is None:
        return arguments
    return (*arguments, "--memory", idle_bytes + budget.spare_bytes)


def _join_string(place: Workplace, uses: int) -> str:
    """Ask for what sites join with, as an operator does."""
    home = ("--home", place.server_home)
    return run_command(SERVER, "token", "create", "--uses", uses, *home).strip()


def _wait_for_server(place: Workplace, programs: Programs) -> None:
    """Wait until the server says where it listens."""
    file, pause = place.server_home / "server.json", threading.Event()
    end = time.monotonic() + _SERVER_START_S
    while not file.exists():
        programs.check()
        if time.monotonic() > end:
            raise DemoError(f"the server did not start:\n{read_text(place.logs / 'server.log')}")
        pause.wait(_LOOK_S)


def _follow(
    place: Workplace, programs: Programs, followed: ClientLogs, watch: Watch
) -> dict[str, ParticipantReport]:
    """Watch until every client was told that the run is over; give a round's plan by name."""
    pause, started = threading.Event(), time.monotonic()
    plans: dict[str, ParticipantReport] = {}
    while not all(programs.has_ended(name) for name in followed.names):
        pause.wait(_LOOK_S)
        programs.check()
        standing = followed.look()
        watch(standing)
        if not plans and standing.revision is not None:
            open_round = read_report(place).round
            plans = {it.name: it for it in open_round.participants} if open_round else {}
        limit_s = _FIRST_ROUND_S if standing.revision is None else _OVERALL_S
        if time.monotonic() - started > limit_s:
            raise DemoError(f"no progress after {limit_s:.0f} s; clients say: {followed.details}")
    return plans
