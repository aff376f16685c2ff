"""A machine that gets smaller while it trains: the slice shrinks by itself and the round goes on.

Memory is taken from a real client in every way there is: its group's limit is lowered, a neighbour
in its group takes memory, and its allocations fail, with and without a limit that it could see.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import psutil
import pytest

from fedra_edge.protocol.deltas import TrainingReport
from fedra_edge.protocol.slices import SliceManifest
from tests.support.edges import EdgeSite, wait_until
from tests.support.federation import Federation, running_federation
from tests.support.memory_groups import MemoryGroup, limited_group
from tests.support.sites import write_folder
from tests.support.wide_vit import prepare_wide_home

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux"),
]

MEGABYTE: Final = 10**6
ROOM_BYTES: Final = 1000 * MEGABYTE
STREAMED_ROOM_BYTES: Final = 130 * MEGABYTE
"""More than a streamed slice takes beside the idle client, and less than a resident one."""

RUN = "shrinking"
STEPS = 48
"""Enough that training lasts until the machine has shrunk under it, also where it is quick."""
LARGE_BYTES = 2**44
TRAINING = {"batch_size": 8, "max_steps": STEPS, "local_epochs": 100, "rank": 2}
NEIGHBOUR = """
import sys
held = bytearray(int(sys.argv[1]))
held[::4096] = b"x" * len(held[::4096])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_wide_home(tmp_path_factory.mktemp("wide"), num_layers=10, inner_size=2**15)


@pytest.fixture
def federation(prepared: Path, tmp_path: Path) -> Iterator[Federation]:
    with running_federation(tmp_path / "server", prepared) as federation:
        yield federation


@pytest.fixture
def site(federation: Federation, tmp_path: Path) -> EdgeSite:
    data = write_folder(tmp_path / "data", seed=1)
    return federation.add_site("press", data.path, tmp_path, poll_s="2", heartbeat_s="0.5")


def start_training(federation: Federation, site: EdgeSite) -> SliceManifest:
    """Let the client train, with all weights in memory; give what it was told."""
    federation.have_running([site])
    federation.start_run(RUN, depth="full", rounds=1, min_participants=1, **TRAINING)
    site.client.wait_for("the second step", lambda event: event.get("steps_done", 0) >= 2)
    manifest = federation.assignments(RUN)[site.name].manifest
    assert (manifest.residency, manifest.micro_batch) == ("resident", 8)
    return manifest


def wait_for_step_down(site: EdgeSite, count: int = 1) -> None:
    wait_until("a step down", lambda: site.complaints().count("stepping down") >= count)


def finish(federation: Federation, site: EdgeSite) -> TrainingReport:
    """Let the round come to its end; give what the server was told of it."""
    federation.wait_for_rounds(RUN, 1)
    assert site.client.is_running
    delta = federation.assignments(RUN)[site.name].delta
    assert delta is not None
    assert delta.report.steps == STEPS
    assert delta.report.residency == "streamed"
    assert delta.report.step_downs[0].startswith("resident, 8 at once -> ")
    assert len(federation.store.assignments(RUN, 1)) == 1  # it was not given up and drawn again
    federation.check_merge(RUN, 1)
    return delta.report


def test_a_client_whose_limit_is_lowered_steps_down_and_finishes(
    federation: Federation, site: EdgeSite
) -> None:
    with limited_group(ROOM_BYTES) as group:
        site.launcher = group.launcher
        promised_bytes = start_training(federation, site).predicted_peak_bytes
        for count, share in ((1, 0.9), (2, 0.6)):
            lower = partial(group.try_limit, int(share * promised_bytes))
            wait_until("a lower limit", lower)
            wait_for_step_down(site, count)
        report = finish(federation, site)
        assert len(report.step_downs) == 2
        assert group.kills == 0
        leave(site)


def test_a_client_whose_neighbour_takes_memory_steps_down_and_finishes(
    federation: Federation, site: EdgeSite
) -> None:
    with limited_group(ROOM_BYTES) as group:
        site.launcher = group.launcher
        promised_bytes = start_training(federation, site).predicted_peak_bytes
        with neighbour(group, ROOM_BYTES - int(0.75 * promised_bytes)):
            wait_for_step_down(site)
            report = finish(federation, site)
        assert re.search(r"only \d+ MB can be used now", report.step_downs[0])
        assert group.kills == 0
        leave(site)


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_client_whose_allocations_fail_steps_down_and_finishes(
    federation: Federation, site: EdgeSite, limit: str
) -> None:
    """Only one of the two limits can be seen by the client; the other one shows in errors alone."""
    federation.have_running([site])
    process = psutil.Process(site.client.pid)
    counted = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[limit]
    idle_bytes = status_bytes(process.pid, counted)
    process.rlimit(getattr(psutil, limit), (LARGE_BYTES, LARGE_BYTES))
    start_training(federation, site)
    most_bytes = idle_bytes + STREAMED_ROOM_BYTES
    process.rlimit(getattr(psutil, limit), (most_bytes, most_bytes))
    wait_for_step_down(site)
    report = finish(federation, site)
    if limit == "RLIMIT_DATA":
        assert report.step_downs[0].endswith("an allocation failed")


def leave(site: EdgeSite) -> None:
    """End the client, so that its group can be removed."""
    assert site.client.ask_to_stop() == 0


def status_bytes(process_id: int, name: str) -> int:
    status = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    match = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert match is not None
    return 1024 * int(match[1])


@contextmanager
def neighbour(group: MemoryGroup, size_bytes: int) -> Iterator[None]:
    """Have another process in a group that occupies so much."""
    command = [*group.launcher, sys.executable, "-c", NEIGHBOUR, str(size_bytes)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="ascii"
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        process.communicate()
        assert process.returncode == 0
