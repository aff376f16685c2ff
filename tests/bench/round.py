"""Latency of a round without training: a real server, two real clients, 2 MB of adapters each.

A round counts from the moment that the revision before it is due until its own is, so it has in
it: planning, waking the clients, their downloads and outboxes, uploads, admission, merging and
publishing, all of it as durable as ever. ``python -m tests.bench.round [--json]``
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

import psutil

from fedra_server.config import ServerHome
from fedra_server.runs import RunState
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.bench.rows import Row, print_rows
from tests.support.edges import wait_until
from tests.support.headquarters import create_run
from tests.support.servers import running_server
from tests.support.wide_adapters import register_wide_model, wide_adapter

RUN = "latency"
_CLIENTS = 2
_ROUNDS = 42
_WARM_UP = 2
_GOAL_MS = 100.0
_MILLISECONDS = 1e3


def main() -> None:
    """Run a run without training and look at the moments its revisions were published."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        store, adapter_bytes = prepare(ServerHome(place / "server"))
        with running_server(place / "server") as server, ExitStack() as stack:
            pids = [
                stack.enter_context(_site(server.url, place / f"site-{number}"))
                for number in range(_CLIENTS)
            ]
            wait_until("the first rounds", lambda: store.revision(RUN).manifest.number >= _WARM_UP)
            before = [_processor_ms(server.process.pid), *map(_processor_ms, pids)]
            wait_until(
                "the last round", lambda: store.run(RUN).state is RunState.FINISHED, timeout_s=300
            )
            after = [_processor_ms(server.process.pid), *map(_processor_ms, pids)]
        moments = [revision.published_at for revision in store.revisions(RUN)]
        store.close()
    rounds_ms = [(it - last) * _MILLISECONDS for last, it in pairwise(moments)][_WARM_UP:]
    used_ms = [(late - early) / len(rounds_ms) for early, late in zip(before, after, strict=True)]
    print_rows(
        "round",
        _rows(rounds_ms, used_ms, adapter_bytes / 2**20),
        ["uvicorn", "fastapi", "sqlalchemy", "httpx", "numpy"],
    )


def prepare(home: ServerHome) -> tuple[Store, int]:
    """Make a home with a run that waits for two clients; give the size of its adapters."""
    home.create()
    store, blobs = Store.open(home.path), BlobStore(home.blobs)
    spec = register_wide_model(store, blobs)
    options = {"rounds": _ROUNDS, "min_participants": _CLIENTS, "adapter": wide_adapter()}
    create_run(store, blobs, spec, RUN, **options)
    first = store.revision(RUN).manifest
    return store, sum(blob.size_bytes for blob in (*first.layers, first.head))


def _rows(rounds_ms: Sequence[float], used_ms: Sequence[float], size_mib: float) -> list[Row]:
    typical_ms, slow_ms = median(rounds_ms), quantiles(rounds_ms, n=10)[-1]
    what = f"a round, {_CLIENTS} clients, {size_mib:.1f} MiB each, median"
    goal = f"<= {_GOAL_MS:.0f} ms"
    return [
        Row(what, typical_ms, "ms", goal=goal, holds=typical_ms <= _GOAL_MS),
        Row("  nine of ten take at most", slow_ms, "ms"),
        Row("  processor time of the server", used_ms[0], "ms"),
        Row("  processor time of both clients", sum(used_ms[1:]), "ms"),
    ]


def _processor_ms(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system) * _MILLISECONDS


@contextmanager
def _site(url: str, home: Path) -> Iterator[int]:
    """Have a client for the length of a block; give the number of its process."""
    command = [sys.executable, "-m", "tests.support.instant_site", url, str(home)]
    with home.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
