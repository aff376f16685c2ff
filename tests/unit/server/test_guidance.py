"""Waiting clients are told what a run waits for; who comes back may bring another name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.rounds import Wait
from fedra_server.guidance import guide
from fedra_server.runs import RunState
from tests.support.builders import RUN, make_profile
from tests.support.headless import Headless


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Headless]:
    headless = Headless(tmp_path)
    yield headless
    headless.store.close()


def reason(server: Headless, client_id: ClientId) -> str:
    told = guide(server.store, server.store.client(client_id), server.clock.now())
    assert isinstance(told, Wait)
    return told.reason


def test_a_run_that_cannot_begin_says_how_many_it_needs(server: Headless) -> None:
    server.create_run(RunState.RUNNING, min_participants=2)
    first = server.enrol("first")
    assert not server.coordinator.advance()
    assert reason(server, first) == f"run {RUN} waits until 2 participants are ready"
    server.enrol("second")
    assert server.coordinator.advance()
    assert reason(server, server.enrol("third")) == f"run {RUN} waits for other participants"


def test_a_client_of_no_run_is_told_that_the_last_one_was_stopped(server: Headless) -> None:
    server.create_run(RunState.CREATED)
    client = server.enrol("client")
    assert reason(server, client) == "no run is active"
    server.store.set_run_state(RUN, RunState.STOPPED, allowed_from={RunState.CREATED})
    assert reason(server, client) == f"no run is active; run {RUN} was stopped"


def test_a_client_that_rejoins_keeps_its_name_unless_it_gives_another(server: Headless) -> None:
    server.create_run(RunState.RUNNING)
    client = server.enrol("client")
    before = server.store.client(client).name
    assert server.store.rejoin(client, make_profile(), None, 1.0).name == before
    assert server.store.rejoin(client, make_profile(), None, 2.0, "Plant South").name == (
        "Plant South"
    )
    assert server.store.client(client).name == "Plant South"
