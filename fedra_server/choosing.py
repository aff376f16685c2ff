"""Says who can be given a slice of a run now, and what keeps the others from it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.ids import ClientId, RunId
from fedra_server.planning import Candidate
from fedra_server.storage.records import ClientRecord


@dataclass(frozen=True)
class Population:
    """The members at one moment.

    ``calibrations`` are those of the run's model, ``busy`` names who cannot take more work now,
    and who was last seen before ``seen_since`` counts as gone.
    """

    clients: Sequence[ClientRecord]
    calibrations: Mapping[ClientId, Calibration]
    busy: Collection[ClientId]
    seen_since: float

    def candidates(self, run: RunId) -> list[Candidate]:
        """Give those that could take part in a run, whether its slices fit them or not."""
        return [
            Candidate(client.client_id, client.profile, self.calibrations[client.client_id])
            for client in self.clients
            if self.obstacle(client, run) is None
        ]

    def obstacle(self, client: ClientRecord, run: RunId) -> str | None:
        """Say what keeps a member from a run, whatever its machine; None when nothing does."""
        if client.run not in {None, run}:
            return f"joined for run {client.run} only"
        if client.client_id in self.busy:
            return "at work for another run"
        if client.client_id not in self.calibrations:
            return "not calibrated yet"
        if not client.is_there(self.seen_since):
            return "offline"
        return None
