"""Uploads that stand still: they cost no thread, and nobody waits for them."""

from __future__ import annotations

import re
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from fedra_server.config import ServerHome
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.blobs import BlobStore
from fedra_server.storage.store import Store
from tests.support.crowd import StallingUpload, open_crowded_round
from tests.support.edges import wait_until
from tests.support.headquarters import create_run, honest_delta, register_model
from tests.support.servers import running_server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc"),
]

RUN = "run"
STALLED = 200
MOST_THREADS = 20


def threads_of(pid: int) -> int:
    found = re.search(r"Threads:\s+(\d+)", Path(f"/proc/{pid}/status").read_text("ascii"))
    assert found is not None
    return int(found[1])


def test_many_stalled_uploads_hold_up_nobody(tmp_path: Path) -> None:
    home = ServerHome(tmp_path / "server")
    home.create()
    with closing(Store.open(home.path)) as store, ExitStack() as stack:
        blobs = BlobStore(home.blobs)
        spec = register_model(store, blobs)
        run = create_run(
            store, blobs, spec, RUN, rounds=1, min_participants=STALLED + 1, deadline_s=600
        )
        *crowd, quick = open_crowded_round(store, spec, RUN, run.spec, STALLED + 1)
        settings = {"heartbeat_timeout_s": "600", "max_strange_requests_per_s": "1000"}
        server = stack.enter_context(running_server(home.path, settings=settings))
        http = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
        stalled = [
            stack.enter_context(closing(StallingUpload(http, spec, participant)))
            for participant in crowd
        ]
        delta = honest_delta(spec, quick.work)
        assert quick.site(http).send(delta).json()["status"] == "admitted"
        assert http.get("/health/ready").status_code == 200
        assert threads_of(server.process.pid) <= MOST_THREADS
        states = [assignment.state for assignment in store.assignments(RUN)]
        assert states.count(AssignmentState.PENDING) == STALLED
        for upload in stalled:
            upload.finish()
        wait_until("the merge", lambda: store.run(RUN).state is RunState.FINISHED)
        assert {it.state for it in store.assignments(RUN)} == {AssignmentState.MERGED}
