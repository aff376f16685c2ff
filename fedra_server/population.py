"""The population as an operator sees it, for the command line and over HTTP alike."""

from __future__ import annotations

from collections import defaultdict
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from fedra_edge.protocol.devices import DeviceProfile
from fedra_edge.protocol.ids import ClientId
from fedra_server.choosing import resting, why_resting
from fedra_server.runs import RunState
from fedra_server.storage.records import ClientRecord
from fedra_server.storage.store import Store

_ACTIVE: Final = frozenset({RunState.RUNNING, RunState.PAUSED})

MemberState = Literal["online", "offline", "left"]


class RestSummary(BaseModel):
    """A client that failed gets no work of a run for a while."""

    model_config = ConfigDict(frozen=True)

    run: str
    failures: int
    until_at: float
    reason: str
    why: str


class ClientSummary(BaseModel):
    """A client in short."""

    model_config = ConfigDict(frozen=True)

    client_id: str
    name: str
    state: MemberState
    run: str | None
    enrolled_at: float
    last_seen_at: float
    rounds_contributed: int
    rests: tuple[RestSummary, ...]
    profile: DeviceProfile


def summarize_clients(
    store: Store, now: float, heartbeat_timeout_s: float, *, include_left: bool = False
) -> list[ClientSummary]:
    """Tell of all clients at one moment; who was silent for so long counts as offline."""
    with store.reading():
        rests = _rests(store, now)
        return [
            ClientSummary(
                client_id=it.client_id,
                name=it.name,
                state=_state(it, now - heartbeat_timeout_s),
                run=it.run,
                enrolled_at=it.enrolled_at,
                last_seen_at=it.last_seen_at,
                rounds_contributed=store.rounds_contributed(it.client_id),
                rests=tuple(rests[it.client_id]),
                profile=it.profile,
            )
            for it in store.clients(include_left=include_left)
        ]


def _rests(store: Store, now: float) -> defaultdict[ClientId, list[RestSummary]]:
    """Find who gets no work of which runs for a while, after failing."""
    rests: defaultdict[ClientId, list[RestSummary]] = defaultdict(list)
    for run in store.runs():
        if run.state in _ACTIVE:
            setbacks = store.setbacks(run.run)
            for client_id in resting(setbacks, now):
                it = setbacks[client_id]
                rests[client_id].append(
                    RestSummary(
                        run=run.run,
                        failures=it.failures,
                        until_at=it.rests_until,
                        reason=it.detail,
                        why=why_resting(it),
                    )
                )
    return rests


def _state(client: ClientRecord, seen_since: float) -> MemberState:
    if client.has_left:
        return "left"
    return "online" if client.is_there(seen_since) else "offline"
