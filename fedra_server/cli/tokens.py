"""fedra-server token: the join strings by which sites get in."""

from __future__ import annotations

import time
from typing import Annotated, Final

import typer
from pydantic import ValidationError

from fedra_server.chain import COMMAND
from fedra_server.cli.names import find_member, usage_error
from fedra_server.cli.output import format_time, tell_json, tell_table
from fedra_server.cli.workplace import (
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    example,
    open_workplace,
)
from fedra_server.durations import parse_duration
from fedra_server.foreseeing import surprises
from fedra_server.inviting import TokenWish, invite, summarize_token

_MOST_USES: Final = 100_000

app = typer.Typer(
    help="Make, list and revoke the join strings by which sites get in.",
    epilog=example("token create --label plant-7"),
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(epilog=example("token create --uses 12 --ttl 7d --label plants"))
def create(
    uses: Annotated[
        int, typer.Option(min=1, max=_MOST_USES, help="How many sites may join with it.")
    ] = 1,
    ttl: Annotated[
        str, typer.Option(metavar="SPAN", help="How long it works, such as 90s, 15m, 24h or 7d.")
    ] = "24h",
    label: Annotated[str, typer.Option(help="What it is for, such as plant-7.")] = "",
    client: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_ID",
            help="Only to enrol this client again, say after a disk swap: it keeps its id and "
            "history, and its old key and sessions end.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="How sites reach the server; else as it listens."),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Print one join string.

    It is all that a site needs: fedra-edge join --server STRING. It is told this once; the server
    keeps a digest of it.
    """
    ttl_s, now = _seconds(ttl), time.time()
    with open_workplace(home) as place:
        client_id = None if client is None else find_member(place.store, client).client_id
        try:
            wish = TokenWish(
                uses=uses, ttl_s=ttl_s, label=label, client_id=client_id, address=address
            )
        except ValidationError as error:
            raise usage_error(error) from None
        made = invite(place.store, place.home, place.config, wish, by=COMMAND, now=now)
        reached_at = made.join_string.address
        for line in surprises(place.home, place.config, reached_at, is_chosen=address is not None):
            typer.echo(line, err=True)
    if as_json:
        told = {"join_string": str(made.join_string), "address": reached_at}
        tell_json({**summarize_token(made.token, now).model_dump(mode="json"), **told})
    else:
        typer.echo(str(made.join_string))


@app.command("list", epilog=example("token list --json"))
def list_tokens(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List the join strings by their ids; secrets are not known."""
    now = time.time()
    with open_workplace(home) as place:
        tokens = place.store.tokens()
    if as_json:
        summaries = [summarize_token(token, now) for token in tokens]
        tell_json({"tokens": [it.model_dump(mode="json") for it in summaries]})
        return
    tell_table(
        ["TOKEN ID", "LABEL", "STATE", "USES LEFT", "EXPIRES", "FOR CLIENT"],
        [
            [
                it.token_id,
                it.label or "-",
                it.why_unusable(now) or "usable",
                f"{it.uses_left} of {it.uses_allowed}",
                format_time(it.expires_at),
                it.client_id or "any",
            ]
            for it in tokens
        ],
        empty="No join strings yet; make one with `fedra-server token create`.",
    )


@app.command(epilog=example("token revoke 3f9a01bc"))
def revoke(
    token_id: Annotated[str, typer.Argument(help="Its id, as `token list` shows it.")],
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """End a join string; sites that have joined stay."""
    now = time.time()
    with open_workplace(home) as place:
        token = place.store.revoke_token(token_id, now, COMMAND)
    if as_json:
        tell_json(summarize_token(token, now))
    else:
        typer.echo(f"Revoked the join string {token_id}")


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text[:40]!r}: {error}") from None
