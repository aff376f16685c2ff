"""Memory of a server and of a client that have nothing to do, whole process trees.

The server has a model registered: once on loopback before anybody has joined, once with TLS after
a client has joined with a join string and stopped. The client runs without PyTorch, in an
environment of its own, and has a run's model before it: once as it waits right after its work, with
the training runtime loaded, once at rest.
``python -m tests.bench.idle [--json]``
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import psutil

from tests.bench.rows import Row, print_rows
from tests.support.edges import EdgeSite, wait_until
from tests.support.environments import environment
from tests.support.federation import Federation, prepare_home, running_federation
from tests.support.sites import write_folder

_MEGABYTE = 10**6
_GOAL_MB = 45.0
_SERVER_GOAL_MB = 90.0
_SECURED = {"FEDRA_SERVER_TLS": "on", "FEDRA_SERVER_ENROLMENT": "token"}


def main() -> None:
    """Let a client work a round, then wait, then rest."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        prepared = prepare_home(place)
        with running_federation(place / "server", prepared) as federation:
            server_mb = _settled_bytes(federation.server.process.pid) / _MEGABYTE
            waiting_mb = _idle_mb(federation, place, "waiting", rest_after_s="3600")
            resting_mb = _idle_mb(federation, place, "resting", rest_after_s="1")
        with running_federation(place / "secured", prepared, _SECURED) as federation:
            secured_mb = _secured_mb(federation, place)
    rows = [
        Row(
            "idle server", server_mb, "MB",
            goal=f"<= {_SERVER_GOAL_MB:.0f} MB", holds=server_mb <= _SERVER_GOAL_MB,
        ),
        Row("idle server, TLS, a client enrolled", secured_mb, "MB"),
        Row("idle client, ONNX Runtime loaded", waiting_mb, "MB"),
        Row(
            "idle client, at rest", resting_mb, "MB", "loaded", resting_mb / waiting_mb,
            f"<= {_GOAL_MB:.0f} MB", resting_mb <= _GOAL_MB,
        ),
    ]  # fmt: skip
    print_rows("idle", rows, ["numpy", "onnxruntime", "httpx"])


def _idle_mb(federation: Federation, place: Path, name: str, rest_after_s: str) -> float:
    data = write_folder(place / "data" / name, seed=1)
    site = federation.add_site(
        name, data.path, place, "--backend", "onnx", python=environment("onnx").python,
        rest_after_s=rest_after_s, poll_s="25",
    )  # fmt: skip
    federation.have_running([site])
    federation.start_run(name, rounds=1, min_participants=1, batch_size=6, max_steps=2)
    federation.wait_for_rounds(name, 1)
    wait_until("the last evaluation", lambda: _is_evaluated(federation, name))
    if name == "resting":
        wait_until("a rest", partial(_is_resting, site))
    site.client.wait_for_phase("waiting", since=len(site.client.events) - 1)
    used = _settled_bytes(site.client.pid)
    assert site.client.ask_to_stop() == 0
    return used / _MEGABYTE


def _secured_mb(federation: Federation, place: Path) -> float:
    data = write_folder(place / "data" / "secured", seed=1)
    site = federation.add_site(
        "enrolled", data.path, place, "--backend", "onnx", python=environment("onnx").python
    )
    site.url = federation.operate("token", "create")["join_string"]
    federation.have_running([site])
    assert site.client.ask_to_stop() == 0
    return _settled_bytes(federation.server.process.pid) / _MEGABYTE


def _is_evaluated(federation: Federation, run: str) -> bool:
    last = federation.report(run).accuracy[-1:]
    return any(row.revision == 1 and row.sites for row in last)


def _is_resting(site: EdgeSite) -> bool:
    return "fedra_edge.resting" in psutil.Process(site.client.pid).cmdline()


def _settled_bytes(pid: int) -> int:
    """Give what the process and its children occupy once that no longer changes."""
    seen: list[int] = []

    def is_settled() -> bool:
        process = psutil.Process(pid)
        everybody = [process, *process.children(recursive=True)]
        seen.append(sum(it.memory_info().rss for it in everybody))
        return len(seen) >= 40 and max(seen[-40:]) == min(seen[-40:])  # two seconds

    wait_until("the memory settles", is_settled)
    return seen[-1]


if __name__ == "__main__":
    main()
