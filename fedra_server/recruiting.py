"""Draws who works on a run next: from the clients that are there to planned slices."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

from fedra_edge.protocol.ids import ClientId, RunId
from fedra_server.choosing import Population, resting
from fedra_server.clock import Clock
from fedra_server.config import ServerConfig
from fedra_server.planning import PlannedSlice, find_unfit, plan_round, round_generator
from fedra_server.storage.records import RunRecord
from fedra_server.storage.store import Store

LOGGER = logging.getLogger(__name__)


class Recruiter:
    """Reads the records, writes nothing; what keeps clients from a run is told to the operator."""

    def __init__(self, store: Store, config: ServerConfig, clock: Clock) -> None:
        self._store = store
        self._config = config
        self._clock = clock
        self._told: dict[tuple[RunId, ClientId], str] = {}

    @property
    def seen_since(self) -> float:
        """The moment before which a client that was last seen counts as gone."""
        return self._clock.now() - self._config.heartbeat_timeout_s

    def draw(
        self,
        run: RunRecord,
        number: int,
        last_trained: Sequence[int],
        *,
        draw: int,
        places: int | None,
        excluded: Collection[ClientId] = (),
    ) -> list[PlannedSlice]:
        """Plan slices for clients without work, at most ``places`` of them.

        Who failed rests for a while; who is ``excluded`` has done its part of the round.
        """
        with self._store.reading():
            population = Population(
                self._store.clients(),
                self._store.calibrations(run.model_id),
                self._store.busy_clients() | set(excluded),
                self.seen_since,
                resting(self._store.setbacks(run.run), self._clock.now()),
            )
        candidates = population.candidates(run.run)
        spec = self._store.model(run.model_id).spec
        generator = round_generator(run.spec, number, draw)
        planned = plan_round(candidates, spec, run.spec, last_trained, generator, places=places)
        chosen = {item.client_id for item in planned}
        left_out = [item for item in candidates if item.client_id not in chosen]
        self._tell(run.run, find_unfit(left_out, spec, run.spec), "cannot take part")
        self._tell(run.run, population.resting, "gets no work")
        return planned

    def _tell(self, run: RunId, reasons: Mapping[ClientId, str], what: str) -> None:
        """Tell the operator, once for each reason, whom a run goes on without and why."""
        for client_id, reason in reasons.items():
            if self._told.get((run, client_id)) != reason:
                self._told[run, client_id] = reason
                LOGGER.warning("run %s: client %s %s: %s", run, client_id, what, reason)
