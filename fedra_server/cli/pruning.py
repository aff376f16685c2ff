"""fedra-server prune: lets go of what only earlier revisions of a run need."""

from __future__ import annotations

from typing import Annotated

import typer

from fedra_edge.protocol.fault_points import fault_point
from fedra_server.cli.output import format_bytes, tell_json
from fedra_server.cli.workplace import DEFAULT_HOME, HomeOption, JsonOption, open_workplace
from fedra_server.clock import SystemClock
from fedra_server.storage.collecting import Collector


def prune(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")],
    keep_revisions: Annotated[
        int, typer.Option(min=1, help="How many revisions to keep, the newest ones.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be deleted.")
    ] = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Delete the deltas and adapters of a run's earlier revisions.

    What is kept can be exported, and audited but for the oldest one. Deltas that are not merged
    yet stay, and so do adapters that a kept revision shares. Adapters of the last day go a day
    later, by the server itself.
    """
    with open_workplace(home) as place:
        collector = Collector(place.store, place.blobs, place.home, SystemClock())
        if dry_run:
            cut = place.store.cut_keeping(name, keep_revisions)
            collected = collector.find(cut).as_collected()
        else:
            cut = place.store.make_cut(name, keep_revisions)
            fault_point("prune.recorded")
            collected = collector.collect()
    if as_json:
        tell_json(
            {
                "run": name,
                "oldest_revision": cut.through,
                "dry_run": dry_run,
                "deltas": collected.deltas,
                "blobs": collected.blobs,
                "freed_bytes": collected.freed_bytes,
            }
        )
        return
    verb = "Would delete" if dry_run else "Deleted"
    typer.echo(
        f"{verb} {collected.deltas} deltas and {collected.blobs} blobs, "
        f"{format_bytes(collected.freed_bytes)}; "
        f"run {name} keeps its revisions from {cut.through} on; "
        "adapters made within the last day follow within a day, while the server runs"
    )
