"""fedra-server audit: check a home and compute its revisions once more, or read its journal."""

from __future__ import annotations

from typing import Annotated, Final

import typer
from typer.core import TyperGroup
from typing_extensions import override

from fedra_server.auditing import AuditReport, audit
from fedra_server.cli.audit_log import show_journal
from fedra_server.cli.output import printable, tell_json, tell_table
from fedra_server.cli.workplace import (
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    example,
    open_workplace,
)
from fedra_server.exit_codes import ExitCode

_UNNAMED: Final = "check"


class AuditGroup(TyperGroup):
    """A group in which a line that names no command of it means ``check``."""

    @override
    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        is_named = bool(args) and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if is_named else [_UNNAMED, *args])


app = typer.Typer(
    cls=AuditGroup,
    help=(
        "Check a home, or read its journal. Without the name of a command, as in "
        "`fedra-server audit digits`, it is `check`."
    ),
    epilog=example("audit digits --json"),
    rich_markup_mode=None,
)
app.command("log", epilog=example("audit log --since 120"))(show_journal)


@app.command(_UNNAMED, epilog=example("audit check digits --json"))
def audit_home(
    run: Annotated[str | None, typer.Argument(help="A run; all of them by default.")] = None,
    revision: Annotated[
        int | None, typer.Option(min=0, help="Compute only this revision of each run again.")
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Check files and records, and compute revisions once more.

    Every revision is computed from its deltas and compared bit for bit. Changes nothing, and may
    run beside the server. Ends with code 7 when anything is broken.
    """
    with open_workplace(home) as place:
        report = audit(place.store, place.blobs, place.home, run=run, revision=revision)
    if as_json:
        tell_json(report)
    else:
        _tell(report, revision)
    raise typer.Exit(ExitCode.OK if report.is_clean else ExitCode.AUDIT)


def _why_nothing(report: AuditReport, revision: int) -> str:
    if any(it.pruned for it in report.runs):
        return f"what revision {revision} was made of was pruned, so it cannot be computed again"
    return f"revision {revision} could not be computed again"


def _tell(report: AuditReport, revision: int | None) -> None:
    tell_table(
        ["RUN", "REVISIONS", "RECOMPUTED", "PRUNED", "DELTAS"],
        [[it.run, it.revisions, it.recomputed, it.pruned, it.deltas] for it in report.runs],
        empty="There are no runs.",
    )
    found = report.difference
    if found is not None:
        where = f"run {found.run}, revision {found.revision}, {found.piece}, {found.tensor}"
        typer.echo(f"First difference: {where}, index {found.index}")
        typer.echo(f"  recorded {found.recorded!r}, recomputed {found.recomputed!r}")
    for rule in report.broken:
        of_run = "" if rule.run is None else f"run {rule.run}, "
        typer.echo(printable(f"Broken: {of_run}{rule.what}: {rule.detail}"))
    if revision is not None and not any(it.recomputed for it in report.runs):
        typer.echo(f"Nothing was computed: {_why_nothing(report, revision)}")
    if report.is_clean:
        typer.echo(f"Clean: {report.blobs} blobs and all records are as they must be.")
