"""Clocks that are years off at a site, or that jump at headquarters, change nothing of a round."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedra_server.runs import AssignmentState
from tests.support.clocks import WrongClock
from tests.support.federation import Federation, running_federation
from tests.support.sites import write_folder

pytestmark = pytest.mark.e2e

TEN_YEARS_S = 10 * 365 * 86_400
HOURS_S = 5 * 3600
WORK = {"min_participants": 2, "batch_size": 6, "merge_weighting": "uniform"}
LONG = {**WORK, "rounds": 1, "local_epochs": 1000, "max_steps": 200, "deadline_s": 600}


@dataclass(frozen=True)
class Plants:
    """A server whose clock can be set, and sites whose clocks are ten years behind and ahead."""

    federation: Federation
    clock: WrongClock
    site_clocks: tuple[WrongClock, ...]


@pytest.fixture(scope="module")
def plants(prepared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plants]:
    place = tmp_path_factory.mktemp("clocks")
    clock = WrongClock(place / "clock of server")
    with running_federation(place / "home", prepared_home, clock.variables) as federation:
        site_clocks = []
        for seed, wrong_by_s in enumerate((-TEN_YEARS_S, TEN_YEARS_S)):
            name = "behind" if wrong_by_s < 0 else "ahead"
            site_clock = WrongClock(place / f"clock of {name}", wrong_by_s)
            data = write_folder(place / "data" / name, seed).path
            site = federation.add_site(name, data, place, backend="torch")
            site.variables = site_clock.variables
            site_clocks.append(site_clock)
        federation.have_running(list(federation.sites.values()))
        yield Plants(federation, clock, tuple(site_clocks))


@pytest.mark.parametrize("wrong_by_s", [-TEN_YEARS_S, TEN_YEARS_S])
def test_a_wrong_clock_is_really_wrong(tmp_path: Path, wrong_by_s: int) -> None:
    clock = WrongClock(tmp_path / "clock", wrong_by_s)
    ask = [sys.executable, "-c", "import json, time; print(json.dumps(time.time()))"]
    told = subprocess.run(ask, env=dict(clock.variables), check=True, capture_output=True)
    assert abs(json.loads(told.stdout) - time.time() - wrong_by_s) < HOURS_S


def test_sites_ten_years_off_take_part_as_any_other(plants: Plants) -> None:
    federation = plants.federation
    federation.start_run("years", rounds=2, max_steps=2, **WORK)
    report = federation.wait_for_rounds("years", 2)
    assert [it.merged for it in report.rounds] == [2, 2]
    federation.check_merge("years", 2)


def test_sites_whose_clocks_are_put_right_keep_what_they_have(plants: Plants) -> None:
    federation = plants.federation
    for site, clock in zip(federation.sites.values(), plants.site_clocks, strict=True):
        assert site.client.ask_to_stop() == 0
        clock.set(0)
    federation.have_running(list(federation.sites.values()))
    federation.start_run("right", rounds=1, max_steps=2, **WORK)
    assert federation.wait_for_rounds("right", 1).rounds[0].merged == 2
    weights = sum(piece.weights.size_bytes for piece in federation.store.models()[0].spec.layers)
    for site in federation.sites.values():
        assert site.client.events[-1]["bytes_received"] < weights
        assert site.deltas_refused == []


@pytest.mark.parametrize("jump_s", [HOURS_S, -HOURS_S])
def test_a_server_whose_clock_jumps_keeps_its_round(plants: Plants, jump_s: int) -> None:
    federation, run = plants.federation, f"jump{jump_s}"
    sites = list(federation.sites.values())
    federation.start_run(run, **LONG)
    for site in sites:
        site.client.wait_for_phase("training", run)
        site.client.freeze()
    opened = federation.store.rounds(run)[0]
    plants.clock.set(jump_s)
    for site in sites:
        site.client.thaw()
    assert federation.wait_for_rounds(run, 1).rounds[0].merged == len(sites)
    records = federation.store.assignments(run)
    assert [it.state for it in records] == [AssignmentState.MERGED] * len(sites)
    closed = federation.store.rounds(run)[0]
    assert (closed.draws, closed.deadline_at) == (1, opened.deadline_at)
    plants.clock.set(0)
