"""How long a server lets honest clients wait, while another one asks for all it can."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedra_edge.protocol import routes
from fedra_edge.protocol.messages import Heartbeat
from fedra_edge.protocol.models import ModelSpec
from fedra_edge.protocol.slices import SliceManifest
from fedra_server.config import ServerHome
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.crowd import open_crowded_round
from tests.support.headquarters import (
    Site,
    connection,
    create_run,
    enrol,
    honest_delta,
    register_model,
)
from tests.support.servers import running_server

_RUN = "shared"
_WARM_UP_S = 2.0


@dataclass(frozen=True)
class Waits:
    """How long each call of a kind took, in seconds."""

    heartbeats: list[float]
    polls: list[float]
    uploads: list[float]

    @property
    def all(self) -> list[float]:
        """Every call."""
        return [*self.heartbeats, *self.polls, *self.uploads]


@dataclass(frozen=True)
class Stage:
    """A server process, honest participants with work, and a member that may go wild."""

    url: str
    pid: int
    spec: ModelSpec
    crowd: list[tuple[Site, SliceManifest]]
    wild: Site

    def measure(self, number: int) -> Waits:
        """Have so many participants beat, poll and deliver, one after the other."""
        waits = Waits([], [], [])
        for _ in range(number):
            site, work = self.crowd.pop()
            beat = Heartbeat(assignment_id=work.assignment_id, steps_done=1, steps_total=2)
            started = time.monotonic()
            assert site.call(routes.HEARTBEAT, beat).json() == {"is_wanted": True}
            beaten = time.monotonic()
            assert site.work(wait_s=0).assignment_id == work.assignment_id
            polled = time.monotonic()
            assert site.send(honest_delta(self.spec, work)).status_code == 200
            waits.heartbeats.append(beaten - started)
            waits.polls.append(polled - beaten)
            waits.uploads.append(time.monotonic() - polled)
        return waits

    @contextmanager
    def flood(self, connections: int) -> Iterator[None]:
        """Let the wild one loose for as long as the block runs, in a process of its own."""
        command = [sys.executable, "-m", "tests.support.flooding", self.url]
        process = subprocess.Popen([*command, self.wild.credential, str(connections)])
        try:
            assert _lasts(process), "the flood did not last"
            yield
            assert process.poll() is None, "the flood did not last"
        finally:
            process.kill()
            process.wait()


@contextmanager
def staged(directory: Path, participants: int) -> Iterator[Stage]:
    """Serve a round that waits for everybody; all are signed in."""
    home = ServerHome(directory / "server")
    home.create()
    with ExitStack() as stack:
        store = Store.open(home.path)
        stack.callback(store.close)
        blobs = BlobStore(home.blobs)
        spec = register_model(store, blobs)
        run = create_run(
            store, blobs, spec, _RUN, rounds=1, min_participants=participants + 1, deadline_s=3600
        )
        crowd = open_crowded_round(store, spec, _RUN, run.spec, participants)
        settings = {"heartbeat_timeout_s": "3600"}
        server = stack.enter_context(running_server(home.path, settings=settings))
        sites = [(it.site(stack.enter_context(connection(server.url))), it.work) for it in crowd]
        wild = enrol(stack.enter_context(connection(server.url)), "wild", _RUN)
        yield Stage(server.url, server.process.pid, spec, sites, wild)


def percentile(values: Sequence[float], percent: float) -> float:
    """Give the value that so many of a hundred do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _lasts(process: subprocess.Popen[bytes]) -> bool:
    """Wait until the flood has begun in earnest."""
    try:
        process.wait(_WARM_UP_S)
    except subprocess.TimeoutExpired:
        return True
    return False
