"""Says who can be given a slice of a run now, and what keeps the others from it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.ids import ClientId, RunId
from fedra_server.planning import Candidate
from fedra_server.rounds import Setback
from fedra_server.storage.records import ClientRecord


@dataclass(frozen=True)
class Population:
    """The members at one moment.

    ``calibrations`` are those of the run's model, ``busy`` names who cannot take more work now,
    ``resting`` says why some get none for a while, and who was last seen before ``seen_since``
    counts as gone.
    """

    clients: Sequence[ClientRecord]
    calibrations: Mapping[ClientId, Calibration]
    busy: Collection[ClientId]
    seen_since: float
    resting: Mapping[ClientId, str] = field(default_factory=dict)

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
        return self.resting.get(client.client_id)


def resting(setbacks: Mapping[ClientId, Setback], now: float) -> dict[ClientId, str]:
    """Say of everybody who failed of late until when it gets no work, and why."""
    return {
        client_id: why_resting(setback)
        for client_id, setback in setbacks.items()
        if setback.failed_at <= now < setback.rests_until
    }


def why_resting(setback: Setback) -> str:
    """Say until when a client gets no work, by the server's clock, and how it failed last."""
    until = datetime.fromtimestamp(setback.rests_until, UTC).strftime("%H:%M:%SZ")
    times = "once" if setback.failures == 1 else f"{setback.failures} times in a row"
    return f"rests until {until}: it failed {times}, last with: {setback.detail}"
