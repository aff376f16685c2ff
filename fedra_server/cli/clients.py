"""fedra-server client: the population."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from pydantic import JsonValue

from fedra_edge.protocol.ids import ClientId, RunId
from fedra_server.choosing import resting, why_resting
from fedra_server.cli.output import format_bytes, format_time, tell_json, tell_table
from fedra_server.cli.workplace import (
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    Workplace,
    example,
    open_workplace,
)
from fedra_server.rounds import Setback
from fedra_server.runs import RunState
from fedra_server.storage.records import ClientRecord

_ACTIVE = frozenset({RunState.RUNNING, RunState.PAUSED})

app = typer.Typer(
    help="See the population.",
    epilog=example("client list"),
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def group() -> None:
    """See the population."""


@app.command("list", epilog=example("client list --json"))
def list_clients(
    home: HomeOption = DEFAULT_HOME,
    show_all: Annotated[bool, typer.Option("--all", help="Also those that have left.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the enrolled clients."""
    with open_workplace(home) as place:
        clients = place.store.clients(include_left=show_all)
        rests = _rests(place, time.time())
        summaries = [_summary(client, place, rests) for client in clients]
    if as_json:
        tell_json({"clients": [*summaries]})
        return
    tell_table(
        ["CLIENT ID", "NAME", "STATE", "RUN", "MEMORY", "ROUNDS", "LAST SEEN", "RESTS"],
        [
            [
                summary["client_id"],
                summary["name"],
                summary["state"],
                summary["run"] or "any",
                format_bytes(client.profile.memory_bytes),
                summary["rounds_contributed"],
                format_time(client.last_seen_at),
                "; ".join(f"in run {run}: {why_resting(it)}" for run, it in rests[client.client_id])
                or "no",
            ]
            for client, summary in zip(clients, summaries, strict=True)
        ],
        empty="No clients yet; one enrols with `fedra-edge join --server URL --data DIR`.",
    )


def _rests(place: Workplace, now: float) -> dict[ClientId, list[tuple[RunId, Setback]]]:
    """Find who gets no work of which runs for a while, after failing."""
    rests: dict[ClientId, list[tuple[RunId, Setback]]] = defaultdict(list)
    for run in place.store.runs():
        if run.state in _ACTIVE:
            setbacks = place.store.setbacks(run.run)
            for client_id in resting(setbacks, now):
                rests[client_id].append((run.run, setbacks[client_id]))
    return rests


def _summary(
    client: ClientRecord,
    place: Workplace,
    rests: Mapping[ClientId, Sequence[tuple[RunId, Setback]]],
) -> dict[str, JsonValue]:
    return {
        "client_id": client.client_id,
        "name": client.name,
        "state": _state(client, place.config.heartbeat_timeout_s),
        "run": client.run,
        "enrolled_at": client.enrolled_at,
        "last_seen_at": client.last_seen_at,
        "rounds_contributed": place.store.rounds_contributed(client.client_id),
        "rests": [
            {
                "run": run,
                "failures": it.failures,
                "until_at": it.rests_until,
                "reason": it.detail,
            }
            for run, it in rests.get(client.client_id, ())
        ],
        "profile": client.profile.model_dump(mode="json"),
    }


def _state(client: ClientRecord, heartbeat_timeout_s: float) -> str:
    if client.has_left:
        return "left"
    return "online" if client.is_there(time.time() - heartbeat_timeout_s) else "offline"
