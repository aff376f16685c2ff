"""fedra-server client: the population."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from fedra_server.chain import COMMAND
from fedra_server.cli.names import find_member
from fedra_server.cli.output import format_bytes, format_time, shorten, tell_json, tell_table
from fedra_server.cli.workplace import (
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    example,
    open_workplace,
)
from fedra_server.leaving import end_membership
from fedra_server.population import summarize_clients

app = typer.Typer(
    help="See the population, and remove who no longer belongs to it.",
    epilog=example("client list"),
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def group() -> None:
    """See the population, and remove who no longer belongs to it."""


@app.command("list", epilog=example("client list --json"))
def list_clients(
    home: HomeOption = DEFAULT_HOME,
    show_all: Annotated[bool, typer.Option("--all", help="Also those that have left.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the enrolled clients."""
    with open_workplace(home) as place:
        timeout_s = place.config.heartbeat_timeout_s
        clients = summarize_clients(place.store, time.time(), timeout_s, include_left=show_all)
    if as_json:
        tell_json({"clients": [client.model_dump(mode="json") for client in clients]})
        return
    tell_table(
        ["CLIENT ID", "NAME", "STATE", "RUN", "MEMORY", "ROUNDS", "LAST SEEN", "RESTS"],
        [
            [
                client.client_id,
                client.name,
                client.state,
                client.run or "any",
                format_bytes(client.profile.memory_bytes),
                client.rounds_contributed,
                format_time(client.last_seen_at),
                shorten("; ".join(f"in run {it.run}: {it.why}" for it in client.rests)) or "no",
            ]
            for client in clients
        ],
        empty="No clients yet; one enrols with `fedra-edge join --server STRING --data DIR`.",
    )


@app.command(epilog=example("client remove plant-7"))
def remove(
    client: Annotated[str, typer.Argument(metavar="NAME_OR_ID", help="The client.")],
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """End a membership at once.

    Its key and its sessions stop working, no other client notices. What it delivered stays. It
    comes back only as a new client, with a new join string.
    """
    with open_workplace(home) as place:
        member = find_member(place.store, client)
        end_membership(place.store, member.client_id, time.time(), removed_by=COMMAND)
    if as_json:
        tell_json({"client_id": member.client_id, "name": member.name, "removed": True})
    else:
        typer.echo(f"Removed the client {member.name} ({member.client_id})")
