"""Real fedra-server processes: start one on a free port, stop it, kill it, run its commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from fedra_edge.protocol.fault_points import FAULT_VARIABLE

_ROOT = Path(__file__).parents[2]
_MAIN = "from fedra_server.cli import main; main()"
_START_S = 60.0


@dataclass(frozen=True)
class ServerProcess:
    """A server that listens; what it writes goes to ``log``, which outlives restarts."""

    home: Path
    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def stop(self, timeout_s: float = 30.0) -> int:
        """Ask it to stop, as an operator would; give its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End it at whatever instruction it is."""
        self.process.kill()
        self.process.wait()


def start_server(
    home: Path,
    *,
    port: int = 0,
    settings: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
    max_open_files: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> ServerProcess:
    """Start a server on a home, made if need be, and wait until it listens.

    ``settings`` are FEDRA_SERVER_* settings by their names in server.toml; the packages named
    in ``without`` are as if they were not installed. ``max_open_files`` is the most that the
    system then allows the server. ``variables`` are further ones of its environment.
    """
    if not (home / "server.toml").exists():
        run_server_command("init", "--home", str(home))
    log = home.with_name(f"{home.name}.log")
    command = [*_command(without), "serve", "--home", str(home), "--port", str(port)]
    if max_open_files is not None:
        command = ["sh", "-c", f'ulimit -n {max_open_files}; exec "$@"', "sh", *command]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**_environment(settings or {}), **(variables or {})},
        )
    try:
        return ServerProcess(home, _url_when_ready(home, process, log), log, process)
    except BaseException:
        process.kill()
        process.wait()
        raise


def serve_until_killed(
    home: Path, fault_point: str, *, port: int = 0, without: Sequence[str] = ()
) -> None:
    """Serve a home until the process kills itself at a fault point."""
    command = [*_command(without), "serve", "--home", str(home), "--port", str(port)]
    with home.with_name(f"{home.name}.log").open("ab") as output:
        environment = {**_environment({}), FAULT_VARIABLE: fault_point}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        code = process.wait(_START_S)
    finally:
        process.kill()
        process.wait()
    assert code == -signal.SIGKILL, f"ended with {code} instead of at {fault_point}"


@contextmanager
def running_server(
    home: Path,
    *,
    port: int = 0,
    settings: Mapping[str, str] | None = None,
    max_open_files: int | None = None,
) -> Iterator[ServerProcess]:
    """Have a server for the length of a block; it may be stopped or killed before."""
    server = start_server(home, port=port, settings=settings, max_open_files=max_open_files)
    try:
        yield server
    finally:
        server.kill()


def run_server_command(
    *arguments: str,
    settings: Mapping[str, str] | None = None,
    check: bool = True,
    without: Sequence[str] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.CompletedProcess[str]:
    """Run any fedra-server command to its end."""
    return subprocess.run(
        [*_command(without), *arguments],
        check=check,
        capture_output=True,
        encoding="utf-8",
        env={**_environment(settings or {}), **variables},
        timeout=_START_S,
    )


def _command(without: Sequence[str]) -> list[str]:
    """Make Python refuse to import some packages, then run the command line."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({list(without)})); "
    return [sys.executable, "-c", (blocked if without else "") + _MAIN]


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    chosen = {"enrolment": "open", **settings}  # tests of join strings ask for "token"
    named = {f"FEDRA_SERVER_{name.upper()}": value for name, value in chosen.items()}
    return {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1", **named}


def _url_when_ready(home: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait for the file that this very process writes; one of a killed server may lie there."""
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            place = json.loads((home / "server.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            place = {}
        if place.get("pid") == process.pid:
            return str(place["url"])
        threading.Event().wait(0.02)
    raise AssertionError(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
