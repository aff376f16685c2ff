"""fedra-server operator: who may steer, watch or scrape the running server over HTTP."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from pydantic import JsonValue

from fedra_server.cli.names import checked_name
from fedra_server.cli.output import format_time, tell_json, tell_table
from fedra_server.cli.workplace import (
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    example,
    open_workplace,
)
from fedra_server.durations import parse_duration
from fedra_server.roles import OperatorRecord, Role
from fedra_server.storage.operators import new_operator_secret

app = typer.Typer(
    help="Let operators and scrapers use the server over HTTP.",
    epilog=example("operator list"),
    no_args_is_help=True,
    rich_markup_mode=None,
)

NameArgument = Annotated[str, typer.Argument(help="Name of the operator; a task, not a person.")]


@app.command(epilog=example("operator add night-shift --role operate --ttl 90d"))
def add(
    name: NameArgument,
    role: Annotated[
        Role,
        typer.Option(
            help="scrape reads /metrics only; view reads all; operate also steers runs; administer "
            "also lets clients in and out."
        ),
    ],
    ttl: Annotated[
        str | None,
        typer.Option(metavar="SPAN", help="How long it works, such as 24h or 90d; else for ever."),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Let an operator in, and print its secret, which is told this once.

    It goes into the header 'Authorization: Bearer SECRET' of requests to /v1/operator/... and
    /metrics. The server keeps its digest only.
    """
    checked_name(name)
    now = time.time()
    record = OperatorRecord(name, role, now, None if ttl is None else now + _seconds(ttl))
    secret = new_operator_secret()
    with open_workplace(home) as place:
        place.store.add_operator(record, secret)
    if as_json:
        tell_json({**_summary(record, now), "secret": secret})
    else:
        typer.echo(secret)


@app.command("list", epilog=example("operator list --json"))
def list_operators(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List the operators; secrets are not known."""
    now = time.time()
    with open_workplace(home) as place:
        operators = place.store.operators()
    if as_json:
        tell_json({"operators": [_summary(record, now) for record in operators]})
        return
    tell_table(
        ["NAME", "ROLE", "ADDED", "EXPIRES"],
        [[it.name, it.role, format_time(it.added_at), _expiry(it, now)] for it in operators],
        empty="No operators yet; add one with `fedra-server operator add NAME --role view`.",
    )


@app.command(epilog=example("operator remove night-shift"))
def remove(
    name: NameArgument, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False
) -> None:
    """Shut an operator out, at once."""
    with open_workplace(home) as place:
        place.store.remove_operator(name)
    if as_json:
        tell_json({"name": name, "removed": True})
    else:
        typer.echo(f"Removed the operator {name}")


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text[:40]!r}: {error}") from None


def _summary(record: OperatorRecord, now: float) -> dict[str, JsonValue]:
    return {
        "name": record.name,
        "role": record.role.value,
        "added_at": record.added_at,
        "expires_at": record.expires_at,
        "valid": record.is_valid(now),
    }


def _expiry(record: OperatorRecord, now: float) -> str:
    if record.expires_at is None:
        return "never"
    return format_time(record.expires_at) + ("" if record.is_valid(now) else " (over)")
