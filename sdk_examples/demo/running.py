"""The main job with real processes: one server, six clients, one run, one exported adapter."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedra_server.reporting import RunReport
from fedra_server.runs import RunState
from sdk_examples.demo.processes import DemoError, Programs, read_text, run_command
from sdk_examples.demo.sites import Site

SERVER: Final = "fedra_server"
EDGE: Final = "fedra_edge"
MODEL: Final = "vit-digits"
RUN: Final = "handwriting"
BUDGETS: Final = (12, 10, 8, 6, 4, 3)
"""How many layers each site may train, as in the paper (FedRA, arXiv 2311.11227)."""

_TRAINING: Final = (
    *("--optimizer", "adamw", "--learning-rate", 0.01),
    *("--batch-size", 32, "--local-epochs", 1),
)
_LOOK_S: Final = 0.5
_REPORT_EVERY_S: Final = 4.0
_SERVER_START_S: Final = 60.0
_OVERALL_S: Final = 1200.0

Watch = Callable[[RunReport], None]
"""Called now and then with what the run achieved so far."""


@dataclass(frozen=True)
class Outcome:
    """What the run left behind: its final report and the exported adapter."""

    report: RunReport
    export: Path
    train_s: float


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

    def client_home(self, site: Site) -> Path:
        """A client's home."""
        return self.root / "clients" / site.name


def run_cohort(
    place: Workplace, model: Path, sites: Sequence[Site], rounds: int, watch: Watch
) -> Outcome:
    """Tune the model at all sites together, from an empty server to an exported adapter.

    Raises:
        DemoError: A program failed.
    """
    prepare_server(place, model, rounds, len(sites))
    with Programs(place.logs) as programs:
        programs.start("server", SERVER, "serve", "--home", place.server_home, "--port", 0)
        url = _server_url(place, programs)
        started = time.monotonic()
        for site, budget in zip(sites, BUDGETS, strict=True):
            programs.start(site.name, EDGE, *_join_arguments(place, site, url, budget))
        report = _follow(place, programs, [site.name for site in sites], watch)
        train_s = time.monotonic() - started
    run_command(SERVER, "export", "--run", RUN, "--out", place.export, "--home", place.server_home)
    return Outcome(report, place.export, train_s)


def prepare_server(place: Workplace, model: Path, rounds: int, participants: int) -> None:
    """Make the server's home, register the model and create the run."""
    home = ("--home", place.server_home)
    run_command(SERVER, "init", *home)
    run_command(SERVER, "model", "add", MODEL, model, *home)
    size = ("--rounds", rounds, "--min-participants", participants)
    run_command(SERVER, "run", "create", RUN, "--model", MODEL, *size, *_TRAINING, "--start", *home)


def read_report(place: Workplace) -> RunReport:
    """Ask the server's records what the run achieved so far."""
    told = run_command(SERVER, "run", "status", RUN, "--json", "--home", place.server_home)
    return RunReport.model_validate_json(told)


def _join_arguments(place: Workplace, site: Site, url: str, budget: int) -> tuple[object, ...]:
    return (
        *("join", "--server", url, "--run", RUN, "--data", site.directory, "--name", site.name),
        *("--home", place.client_home(site), "--max-layers", budget, "--threads", 1, "--json"),
    )


def _server_url(place: Workplace, programs: Programs) -> str:
    """Wait until the server says where it listens."""
    file, pause = place.server_home / "server.json", threading.Event()
    end = time.monotonic() + _SERVER_START_S
    while not file.exists():
        programs.check()
        if time.monotonic() > end:
            raise DemoError(f"the server did not start:\n{read_text(place.logs / 'server.log')}")
        pause.wait(_LOOK_S)
    return str(json.loads(read_text(file))["url"])


def _follow(
    place: Workplace, programs: Programs, clients: Sequence[str], watch: Watch
) -> RunReport:
    """Watch until every client was told that the run is over."""
    pause, started, reported = threading.Event(), time.monotonic(), 0.0
    while not all(programs.has_ended(name) for name in clients):
        pause.wait(_LOOK_S)
        programs.check()
        now = time.monotonic()
        if now - started > _OVERALL_S:
            raise DemoError(f"the run is not over after {_OVERALL_S:.0f} s; see {place.logs}")
        if now - reported > _REPORT_EVERY_S:
            watch(read_report(place))
            reported = time.monotonic()
    report = read_report(place)
    watch(report)
    if report.state is not RunState.FINISHED:
        raise DemoError(f"all clients ended, but the run is {report.state}; see {place.logs}")
    return report
