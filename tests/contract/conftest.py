"""One real server for all contract tests of a module; each test brings its own runs and sites."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from fedra_edge.protocol.slices import SliceManifest
from fedra_server.config import ServerConfig
from tests.support.headquarters import Headquarters, Site, headquarters, home_in

Participants = Callable[[], list[tuple[Site, SliceManifest]]]

_NAMES = itertools.count(1)


@pytest.fixture(scope="module")
def hq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Headquarters]:
    """A server with one registered model and no active run."""
    config = ServerConfig(
        max_request_bytes=100_000,
        max_enrolments_per_minute=10_000,
        max_requests_at_once=200,
        max_strange_requests_per_s=10_000,
    )
    with headquarters(home_in(tmp_path_factory.mktemp("home")), config) as running:
        yield running


@pytest.fixture
def site(hq: Headquarters) -> Iterator[Site]:
    """A calibrated client."""
    with hq.site("plant") as enrolled:
        yield enrolled


@pytest.fixture
def participants(hq: Headquarters) -> Iterator[Participants]:
    """Opens a round of a new run with two participants, each with its work."""
    with ExitStack() as stack:

        def open_round() -> list[tuple[Site, SliceManifest]]:
            run = f"run-{next(_NAMES)}"
            stack.enter_context(hq.run(run, rounds=2, min_participants=2))
            sites = [stack.enter_context(hq.site(f"{run} {i}", run)) for i in range(2)]
            return [(enrolled, enrolled.work()) for enrolled in sites]

        yield open_round


@pytest.fixture
def participant(participants: Participants) -> tuple[Site, SliceManifest]:
    """One participant of a round that waits for two."""
    return participants()[0]
