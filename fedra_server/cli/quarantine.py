"""fedra-server quarantine: deltas that screening holds back, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated

import typer
from pydantic import JsonValue

from fedra_edge.protocol.ids import AssignmentId
from fedra_server.cli.output import format_time, shorten, tell_json, tell_table
from fedra_server.cli.workplace import (
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    Workplace,
    example,
    open_workplace,
)
from fedra_server.errors import NotFoundError
from fedra_server.storage.records import ScreeningRecord

app = typer.Typer(
    help="See and decide on deltas that screening holds back.",
    epilog=example("quarantine list"),
    no_args_is_help=True,
    rich_markup_mode=None,
)

_ANY_ID = {"ignore_unknown_options": True}
"""Ids may begin with a hyphen."""

DeltaArgument = Annotated[str, typer.Argument(help="Its id, as `quarantine list` shows it.")]


@app.command("list", epilog=example("quarantine list --json"))
def list_held(
    run: Annotated[str | None, typer.Argument(help="A run; all of them by default.")] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """List the deltas that wait for a decision.

    Those of runs that are over stay until they are discarded; nothing merges them any more.
    """
    with open_workplace(home) as place:
        rows = place.store.held_screenings(run)
        rows.sort(key=lambda row: (row.judged_at, row.assignment_id))
        found = [
            _summary(place, AssignmentId(delta), list(own))
            for delta, own in groupby(rows, key=lambda row: row.assignment_id)
        ]
    if as_json:
        tell_json({"deltas": [*found]})
        return
    tell_table(
        ["DELTA", "RUN", "ROUND", "CLIENT", "JUDGED AT", "PIECES", "WHY"],
        [
            [
                it["delta"], f"{it['run']} ({it['run_state']})", it["round"], it["client"],
                format_time(own[0].judged_at), shorten(",".join(row.piece for row in own)),
                shorten(own[0].reason),
            ]
            for it, own in (
                (it, [row for row in rows if row.assignment_id == it["delta"]]) for it in found
            )
        ],
        empty="Nothing is quarantined.",
    )  # fmt: skip


@app.command(context_settings=_ANY_ID, epilog=example("quarantine show 3kQ0... --json"))
def show(
    delta: DeltaArgument, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False
) -> None:
    """Show what was measured and decided of a delta, piece by piece."""
    with open_workplace(home) as place:
        rows = place.store.screenings_of(AssignmentId(delta))
        if not rows:
            raise NotFoundError(
                f"delta {delta} was not screened", remedy="See `fedra-server quarantine list`."
            )
        summary = _summary(place, AssignmentId(delta), rows)
        merged = place.store.merged_in(AssignmentId(delta))
    if as_json:
        tell_json(summary)
        return
    typer.echo(f"Delta {delta} of client {summary['client']} ({summary['client_id']})")
    typer.echo(f"Run {summary['run']}, round {summary['round']}; the delta is {summary['state']}")
    typer.echo(f"File {summary['file']}\n")
    tell_table(
        ["PIECE", "NORM", "COSINE", "SCALE", "VERDICT", "DECISION", "MERGED IN", "WHY"],
        [
            [
                row.piece,
                "-" if row.norm is None else f"{row.norm:.4g}",
                "-" if row.cosine is None else f"{row.cosine:.3f}",
                f"{row.scale:.3g}",
                row.verdict,
                row.outcome or "-",
                f"revision {merged[row.piece]}" if row.piece in merged else "-",
                row.reason or "-",
            ]
            for row in rows
        ],
        empty="",
    )


@app.command(context_settings=_ANY_ID, epilog=example("quarantine release 3kQ0..."))
def release(
    delta: DeltaArgument, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False
) -> None:
    """Merge what is quarantined of a delta with the next publication.

    It is clipped as others are, weighs the less for its staleness, and is refused when it is
    staler than the run allows.
    """
    with open_workplace(home) as place:
        rows = place.store.release(AssignmentId(delta))
    _tell("released", delta, rows, as_json=as_json)


@app.command(context_settings=_ANY_ID, epilog=example("quarantine discard 3kQ0..."))
def discard(
    delta: DeltaArgument, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False
) -> None:
    """Decide that what is quarantined of a delta is never merged.

    Its file stays until `prune` lets go of its round, so that an audit can judge it again.
    """
    with open_workplace(home) as place:
        rows = place.store.discard(AssignmentId(delta))
    _tell("discarded", delta, rows, as_json=as_json)


def _tell(outcome: str, delta: str, rows: Sequence[ScreeningRecord], *, as_json: bool) -> None:
    pieces = [row.piece for row in rows]
    if as_json:
        tell_json({"delta": delta, "outcome": outcome, "pieces": [*pieces]})
    else:
        typer.echo(f"{outcome.capitalize()} {', '.join(pieces)} of delta {delta}")


def _summary(
    place: Workplace, delta: AssignmentId, rows: Sequence[ScreeningRecord]
) -> dict[str, JsonValue]:
    assignment = place.store.assignment(delta)
    client = place.store.client(assignment.client_id)
    merged = place.store.merged_in(delta)
    return {
        "delta": delta,
        "run": assignment.run,
        "run_state": place.store.run(assignment.run).state.value,
        "round": assignment.round_number,
        "client_id": client.client_id,
        "client": client.name,
        "state": assignment.state.value,
        "judged_at": rows[0].judged_at,
        "file": str(place.home.delta_file(delta)),
        "pieces": [
            {
                "piece": row.piece,
                "norm": row.norm,
                "cosine": row.cosine,
                "scale": row.scale,
                "verdict": row.verdict.value,
                "outcome": None if row.outcome is None else row.outcome.value,
                "reason": row.reason,
                "revision": row.revision,
                "merged_in": merged.get(row.piece),
            }
            for row in rows
        ],
    }
