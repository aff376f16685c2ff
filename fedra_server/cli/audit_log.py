"""fedra-server audit log: the journal, verified and told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated

import typer
from pydantic import JsonValue

from fedra_server.chain import BrokenChain, Entry, Head
from fedra_server.cli.output import format_time, printable, tell_json
from fedra_server.cli.workplace import DEFAULT_HOME, HomeOption, JsonOption, open_workplace
from fedra_server.exit_codes import ExitCode


def show_journal(
    since: Annotated[int, typer.Option(min=1, help="Show entries from this number on.")] = 1,
    head: Annotated[
        bool, typer.Option("--head", help="Print only the newest entry's NUMBER:SHA256.")
    ] = False,
    expect: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER:SHA256",
            help="What --head printed once; the journal must contain it. Only the verdict is "
            "printed, unless --json is given.",
        ),
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Show who joined and what was planned, received, merged and exported.

    The chain of digests is verified from its first entry, and what it tells of plans, deltas and
    revisions is held against the records. Keep elsewhere what --head prints: with
    --expect it proves later that nothing was rewritten or cut off. Ends with code 7, and names the
    first broken entry, when anything was.
    """
    expected = None if expect is None else _head_of(expect)
    with open_workplace(home) as place, place.store.reading():
        outcome = place.store.verify_journal(expected)
        if isinstance(outcome, Head) and not head:
            outcome = place.store.first_contradiction() or outcome
        intact = outcome.sequence if isinstance(outcome, Head) else outcome.sequence - 1
        wanted = 0 if head else max(0, intact - since + 1)
        entries = place.store.journal(since, wanted)
        if as_json:
            tell_json(_document(entries, outcome))
        elif expected is None:
            _tell(entries)
    if not as_json:
        _tell_outcome(outcome, head_alone=head)
    raise typer.Exit(ExitCode.OK if isinstance(outcome, Head) else ExitCode.AUDIT)


def _head_of(text: str) -> Head:
    try:
        return Head.parse(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text[:100]!r}: {error}, as --head prints it") from None


def _document(entries: Iterable[Entry], outcome: Head | BrokenChain) -> dict[str, JsonValue]:
    document: dict[str, JsonValue] = {"entries": [_told(it) for it in entries]}
    if isinstance(outcome, Head):
        return document | {"head": str(outcome), "broken": None}
    broken: dict[str, JsonValue] = {"sequence": outcome.sequence, "detail": outcome.detail}
    return document | {"head": None, "broken": broken}


def _told(entry: Entry) -> dict[str, JsonValue]:
    return asdict(entry) | {"details": json.loads(entry.details)}


def _tell(entries: Iterable[Entry]) -> None:
    """Print a line for each entry; there may be more of them than memory would hold."""
    for it in entries:
        line = f"{it.sequence:>6}  {format_time(it.at)}  {it.event:<18}  {it.subject}"
        details = " ".join(_plainly(json.loads(it.details)))
        typer.echo(printable(f"{line}  by {it.by}  {details}".rstrip()))


def _plainly(details: Mapping[str, JsonValue], within: str = "") -> Iterator[str]:
    """Write what is known of an entry's details for people."""
    for name, value in details.items():
        key = f"{within}{name}"
        if isinstance(value, dict):
            yield from _plainly(value, f"{key}.")
        elif isinstance(value, bool):
            yield f"{key}={'yes' if value else 'no'}"
        elif isinstance(value, int | float) and name.endswith("_at"):
            yield f"{key}={format_time(value).replace(' ', 'T')}"
        elif value is not None:
            yield f"{key}={value}"


def _tell_outcome(outcome: Head | BrokenChain, *, head_alone: bool) -> None:
    if isinstance(outcome, BrokenChain):
        typer.echo(printable(f"Broken: entry {outcome.sequence}: {outcome.detail}"))
    else:
        typer.echo(str(outcome) if head_alone else f"Verified: the newest entry is {outcome}")
