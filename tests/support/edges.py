"""Real fedra-edge processes: start one, follow what it says, stop it, kill it, freeze it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from fedra_edge.config import EdgeConfig
from fedra_edge.identity import Identity, IdentityFile
from fedra_edge.outbox import Outbox
from tests.support.keys import SiteKey, open_session

Event = dict[str, Any]

NONE: Mapping[str, str] = {}
PATIENCE_S = 90.0
_ROOT = Path(__file__).parents[2]
_TICK_S = 0.05


def wait_until(what: str, is_so: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Look until something is so; fail, saying what was awaited, when it does not become so."""
    tick = threading.Event()
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain for: {what}"
        tick.wait(_TICK_S)


def run_edge_command(
    *arguments: str,
    settings: Mapping[str, str] | None = None,
    python: Path | None = None,
    variables: Mapping[str, str] = NONE,
) -> subprocess.CompletedProcess[str]:
    """Run any fedra-edge command to its end, with this interpreter or another one."""
    return subprocess.run(
        [*_command(python), *arguments],
        check=False,
        capture_output=True,
        encoding="utf-8",
        env={**_environment(settings or {}), **variables},
        timeout=PATIENCE_S,
    )


class EdgeProcess:
    """A client that takes part; every JSON line that it wrote is kept in ``events``."""

    def __init__(
        self,
        command: list[str],
        log: Path,
        settings: Mapping[str, str],
        variables: Mapping[str, str] = NONE,
    ) -> None:
        self.log = log
        self.events: list[Event] = []
        self._news = threading.Condition()
        self._has_ended = False
        with log.open("ab") as complaints:
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=complaints,
                encoding="utf-8",
                env={**_environment(settings), **variables},
            )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is there, frozen or not."""
        return self._process.poll() is None

    def wait_for(self, what: str, matches: Callable[[Event], object], *, since: int = 0) -> Event:
        """Wait for an event, from number ``since`` on; fail when the client ends without it."""
        deadline = time.monotonic() + PATIENCE_S
        with self._news:
            while True:
                for event in self.events[since:]:
                    if matches(event):
                        return event
                remaining_s = deadline - time.monotonic()
                if self._has_ended or remaining_s <= 0:
                    last = "\n".join(map(str, self.events[-5:]))
                    complaints = self.log.read_text(encoding="utf-8")[-2000:]
                    raise AssertionError(f"waited in vain for: {what}\n{last}\n{complaints}")
                self._news.wait(remaining_s)

    def wait_for_phase(self, phase: str, run: str | None = None, *, since: int = 0) -> Event:
        """Wait until the client is in a phase, in the work of a run if one is named."""
        return self.wait_for(
            f"{phase} in run {run}" if run else phase,
            lambda event: event.get("phase") == phase and (run is None or event["run"] == run),
            since=since,
        )

    def wait_for_end(self) -> int:
        """Wait until the client ends by itself; give its exit code."""
        code = self._process.wait(PATIENCE_S)
        self._reader.join()
        return code

    def ask_to_stop(self) -> int:
        """Send what a service manager sends (SIGTERM); give the exit code."""
        self._process.terminate()
        return self.wait_for_end()

    def kill(self) -> None:
        """End it at whatever instruction it is (SIGKILL)."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def freeze(self) -> None:
        """Let it run no further instruction, as on a machine that stalls."""
        psutil.Process(self._process.pid).suspend()

    def thaw(self) -> None:
        """Let a frozen one go on; changes nothing for others."""
        if self.is_running:
            psutil.Process(self._process.pid).resume()

    def _read(self) -> None:
        output = self._process.stdout
        assert output is not None
        for line in output:
            with self._news:
                self.events.append(json.loads(line))
                self._news.notify_all()
        output.close()
        with self._news:
            self._has_ended = True
            self._news.notify_all()


@dataclass
class EdgeSite:
    """A machine that takes part: home, data and log outlive each process of its client.

    ``launcher`` is put before the command of each client, for limits to run it under;
    ``python`` is the interpreter of the environment it is installed in, if not this one;
    ``variables`` are further ones of its environment.
    """

    name: str
    url: str
    home: Path
    data: Path
    log: Path
    options: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    launcher: tuple[str, ...] = ()
    python: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    processes: list[EdgeProcess] = field(default_factory=list)

    @property
    def client(self) -> EdgeProcess:
        """The latest process."""
        return self.processes[-1]

    @property
    def is_running(self) -> bool:
        return bool(self.processes) and self.client.is_running

    def join(self, *options: str) -> EdgeProcess:
        """Start a client on this machine; only one can run at a time."""
        command = [
            *self.launcher, *_command(self.python), "join", "--json", "--server", self.url,
            "--home", str(self.home), "--data", str(self.data), "--name", self.name,
            *self.options, *options,
        ]  # fmt: skip
        self.processes.append(EdgeProcess(command, self.log, self.settings, self.variables))
        return self.client

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another command on this machine's home."""
        given = (*arguments, "--home", str(self.home))
        return run_edge_command(*given, settings=self.settings, python=self.python)

    @property
    def config(self) -> EdgeConfig:
        """The settings that its client has, for the places of its files."""
        return EdgeConfig(server=self.url, home=self.home)

    @property
    def identity_file(self) -> IdentityFile:
        return IdentityFile(self.config.membership, self.config.server)

    @property
    def identity(self) -> Identity:
        """Who the site is for the server; it must have joined before."""
        identity = self.identity_file.load()
        assert identity is not None
        return identity

    def session(self, http: httpx.Client) -> str:
        """Sign in with the site's own key, as its client does."""
        pem = (self.config.membership / "key.pem").read_bytes()
        return open_session(http, SiteKey.from_pem(pem), self.identity.client_id)

    @property
    def deltas_waiting(self) -> int:
        return Outbox(self.config.outbox).num_waiting

    @property
    def deltas_refused(self) -> list[str]:
        """The assignments whose deltas the server did not want; the deltas are still there."""
        return sorted(path.stem for path in (self.config.outbox / "refused").glob("*.safetensors"))

    def complaints(self) -> str:
        """Everything its clients wrote to standard error."""
        return self.log.read_text(encoding="utf-8")


def _command(python: Path | None) -> list[str]:
    return [str(python or sys.executable), "-m", "fedra_edge"]


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    named = {f"FEDRA_EDGE_{name.upper()}": value for name, value in settings.items()}
    own = {"PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **named}
