"""Peak memory of a server, by how many deltas it takes in and merges, and how many come at once.

Every figure is of a real server process that receives all deltas over sockets and then merges
them. ``python -m tests.bench.server_memory [--json]``
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from fedra_edge.protocol.models import ModelSpec
from fedra_server.config import ServerHome
from fedra_server.runs import RunState
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.bench.rows import Row, print_rows
from tests.support.crowd import Participant, StallingUpload, open_crowded_round
from tests.support.edges import wait_until
from tests.support.headquarters import create_run, honest_delta, register_model
from tests.support.servers import running_server
from tests.support.wide_adapters import register_wide_model, wide_adapter

_RUN = "crowd"
_FEW, _MANY = 10, 1000
_AT_ONCE = 200
_SENDERS = 4
_MEGABYTE = 10**6
_GOAL = 1.2
_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Stage:
    """A server whose only round waits for every one of its participants."""

    url: str
    pid: int
    store: Store
    spec: ModelSpec
    crowd: list[Participant]

    def peak_mb(self) -> float:
        """Wait until everything is merged, and give the most that the process occupied."""
        wait_until(
            "the merge",
            lambda: self.store.run(_RUN).state is RunState.FINISHED,
            timeout_s=_PATIENCE_S,
        )
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None, status
        return int(found[1]) * 1024 / _MEGABYTE


def main() -> None:
    """Compare many with few, in number and at the same time."""
    few, many = (_peak_one_by_one(size) for size in (_FEW, _MANY))
    few_at_once, many_at_once = (_peak_at_once(size) for size in (_FEW, _AT_ONCE))
    print_rows(
        "server_memory",
        [
            Row(f"server, {_FEW} small deltas", few, "MB"),
            _row(f"server, {_MANY} small deltas", many, few),
            Row(f"server, {_FEW} deltas of 2 MB at once", few_at_once, "MB"),
            _row(f"server, {_AT_ONCE} deltas of 2 MB at once", many_at_once, few_at_once),
        ],
        ["uvicorn", "fastapi", "sqlalchemy", "numpy"],
    )


def _row(what: str, value: float, base: float) -> Row:
    ratio = value / base
    return Row(what, value, "MB", f"{_FEW}", ratio, f"<= {_GOAL} x", ratio <= _GOAL)


def _peak_one_by_one(size: int) -> float:
    """Send small deltas from a few threads, each over one connection."""
    with _staged(size, register_model) as stage:
        with ThreadPoolExecutor(_SENDERS) as senders:
            shares = [stage.crowd[first::_SENDERS] for first in range(_SENDERS)]
            list(senders.map(partial(_send_all, stage), shares))
        return stage.peak_mb()


def _send_all(stage: Stage, crowd: list[Participant]) -> None:
    with httpx.Client(base_url=stage.url, timeout=_PATIENCE_S) as http:
        for participant in crowd:
            answer = participant.site(http).send(honest_delta(stage.spec, participant.work))
            assert answer.status_code == 200, answer.text


def _peak_at_once(size: int) -> float:
    """Have so many uploads stand half-way together before the first of them ends."""
    options = {"adapter": wide_adapter()}
    with _staged(size, register_wide_model, **options) as stage, ExitStack() as stack:
        http = stack.enter_context(httpx.Client(base_url=stage.url, timeout=_PATIENCE_S))
        uploads = [
            stack.enter_context(closing(StallingUpload(http, stage.spec, participant)))
            for participant in stage.crowd
        ]
        for upload in uploads:
            upload.finish()
        return stage.peak_mb()


@contextmanager
def _staged(
    size: int, register: Callable[[Store, BlobStore], ModelSpec], **options: object
) -> Iterator[Stage]:
    with tempfile.TemporaryDirectory() as directory:
        home = ServerHome(Path(directory) / "server")
        home.create()
        with closing(Store.open(home.path)) as store:
            blobs = BlobStore(home.blobs)
            spec = register(store, blobs)
            run = create_run(
                store, blobs, spec, _RUN, rounds=1, min_participants=size, deadline_s=3600,
                **options,
            )  # fmt: skip
            crowd = open_crowded_round(store, spec, _RUN, run.spec, size)
            settings = {
                "heartbeat_timeout_s": "3600",
                "log_level": "warning",
                "max_strange_requests_per_s": "10000",
            }
            with running_server(home.path, settings=settings) as server:
                yield Stage(server.url, server.process.pid, store, spec, crowd)


if __name__ == "__main__":
    main()
