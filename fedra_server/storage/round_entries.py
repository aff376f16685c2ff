"""What the journal tells of rounds: plans, deltas and revisions, each by digest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import JsonValue
from sqlalchemy import Connection

from fedra_edge.protocol.deltas import DeltaManifest
from fedra_server.chain import SERVER, Event, author, canonical, sha256_of
from fedra_server.runs import AssignmentState
from fedra_server.storage.journal import Happening, write_entries, write_entry
from fedra_server.storage.records import (
    AssignmentRecord,
    MergeRecord,
    RevisionRecord,
    RoundRecord,
)
from fedra_server.storage.rows import AnyRow
from fedra_server.storage.runs import manifest_sha256


def plan_sha256(work: Iterable[tuple[str, str, str, float]]) -> str:
    """Digest the work that was handed out at one moment, in whatever order it is given.

    Of each assignment: its id, its client, its manifest as it is stored, and its chance.
    """
    return sha256_of(canonical([list(it) for it in sorted(work)]))


def merges_sha256(merges: Iterable[MergeRecord | AnyRow]) -> str:
    """Digest what a revision was merged of, in whatever order it is given."""
    rows: list[JsonValue] = [
        [it.assignment_id, it.piece, it.weight, it.staleness, it.scale]
        for it in sorted(merges, key=lambda it: (it.assignment_id, it.piece))
    ]
    return sha256_of(canonical(rows))


def tell_plan(
    connection: Connection, current: RoundRecord, assignments: Sequence[AssignmentRecord]
) -> None:
    """Tell what work was handed out, if any was."""
    if not assignments:
        return
    details: dict[str, JsonValue] = {
        "round": current.number,
        "base_revision": current.base_revision,
        "assignments": len(assignments),
        "issued_at": assignments[0].issued_at,
        "plan_sha256": plan_sha256(
            (it.assignment_id, it.client_id, it.manifest.model_dump_json(), it.chance)
            for it in assignments
        ),
    }
    write_entry(connection, Event.ROUND_PLANNED, current.run, SERVER, details)


def tell_delta(
    connection: Connection, after: AssignmentRecord, delta: DeltaManifest | None
) -> None:
    """Tell what was received, and what became of it; nothing where work only ended."""
    told: list[Happening] = []
    verdict: dict[str, JsonValue] = {"run": after.run}
    if delta is not None:
        verdict["sha256"] = delta.sha256
        received: dict[str, JsonValue] = {
            "run": after.run,
            "round": after.round_number,
            "sha256": delta.sha256,
            "size_bytes": delta.size_bytes,
        }
        by = author(after.client_id)
        told.append(Happening(Event.DELTA_RECEIVED, after.assignment_id, by, received))
    if after.state is AssignmentState.ADMITTED:
        told.append(Happening(Event.DELTA_ADMITTED, after.assignment_id, SERVER, verdict))
    elif after.state is AssignmentState.REFUSED:
        verdict["code"] = after.detail.partition(":")[0]
        told.append(Happening(Event.DELTA_REFUSED, after.assignment_id, SERVER, verdict))
    if told:
        write_entries(connection, *told)


def tell_publication(
    connection: Connection, revision: RevisionRecord, merges: Sequence[MergeRecord]
) -> None:
    """Tell what was published, and what it was merged of."""
    details: dict[str, JsonValue] = {
        "revision": revision.manifest.number,
        "revision_sha256": manifest_sha256(revision.manifest),
        "merges": len(merges),
        "merges_sha256": merges_sha256(merges),
    }
    write_entry(connection, Event.REVISION_PUBLISHED, revision.run, SERVER, details)
