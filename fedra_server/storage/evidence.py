"""Holds the journal against the records: what it tells of by digest must still be so."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from sqlalchemy import Connection, func, select

from fedra_server.chain import BrokenChain, Entry, Event, sha256_of
from fedra_server.storage import tables
from fedra_server.storage.journal import Journal
from fedra_server.storage.round_entries import merges_sha256, plan_sha256

_ASSIGNMENTS: Final = tables.assignments.c
_MERGES: Final = tables.merges.c
_REVISIONS: Final = tables.revisions.c

Details = Mapping[str, Any]


class Evidence(Journal):
    """Every method is one transaction."""

    def first_contradiction(self) -> BrokenChain | None:
        """Find the first entry that the records contradict, of a journal whose chain is whole.

        Of runs whose creation it tells of, the journal must tell of every revision and delta.
        """
        told: Counter[tuple[str, str]] = Counter()
        runs: dict[str, int] = {}
        with self.reading() as connection:
            for entry in self.journal():
                details: Details = json.loads(entry.details)
                check = _CHECKS.get(entry.event)
                fault = "" if check is None else check(connection, entry, details)
                if fault:
                    return BrokenChain(entry.sequence, f"the records contradict it: {fault}")
                if entry.event == Event.RUN_CREATED:
                    runs[entry.subject] = entry.sequence
                told[entry.event, details.get("run", entry.subject)] += 1
            for run, sequence in runs.items():
                fault = _untold(connection, run, told)
                if fault:
                    return BrokenChain(sequence, f"of this run it lacks {fault}")
        return None


def _revision_fault(connection: Connection, entry: Entry, details: Details) -> str:
    number = details["revision"]
    query = select(_REVISIONS.manifest).where(
        _REVISIONS.run == entry.subject, _REVISIONS.number == number
    )
    manifest = connection.scalar(query)
    if manifest is None or sha256_of(manifest) != details["revision_sha256"]:
        return f"revision {number} is another one, or not there"
    merges = select(tables.merges).where(
        _MERGES.run == entry.subject, _MERGES.revision == number
    )  # fmt: skip
    if merges_sha256(connection.execute(merges).all()) != details["merges_sha256"]:
        return f"revision {number} was merged of something else"
    return ""


def _plan_fault(connection: Connection, entry: Entry, details: Details) -> str:
    query = select(
        _ASSIGNMENTS.assignment_id,
        _ASSIGNMENTS.client_id,
        _ASSIGNMENTS.manifest,
        _ASSIGNMENTS.chance,
    ).where(
        _ASSIGNMENTS.run == entry.subject,
        _ASSIGNMENTS.round_number == details["round"],
        _ASSIGNMENTS.issued_at == details["issued_at"],
    )
    if (
        plan_sha256((it[0], it[1], it[2], it[3]) for it in connection.execute(query))
        != details["plan_sha256"]
    ):
        return f"other work was handed out in round {details['round']}"
    return ""


def _delta_fault(connection: Connection, entry: Entry, details: Details) -> str:
    query = select(_ASSIGNMENTS.delta).where(_ASSIGNMENTS.assignment_id == entry.subject)
    said = f'"sha256":"{details["sha256"]}"'
    return "" if said in (connection.scalar(query) or "") else "another delta, or none, is recorded"


def _untold(connection: Connection, run: str, told: Counter[tuple[str, str]]) -> str:
    """Say what the journal does not tell of a run."""
    published = select(func.count()).where(_REVISIONS.run == run, _REVISIONS.number > 0)
    admitted = select(func.count()).where(_ASSIGNMENTS.run == run, _ASSIGNMENTS.delta.is_not(None))
    if connection.scalar(published) != told[Event.REVISION_PUBLISHED, run]:
        return "a revision"
    if connection.scalar(admitted) != told[Event.DELTA_ADMITTED, run]:
        return "an admitted delta"
    return ""


_CHECKS: Final[Mapping[str, Callable[[Connection, Entry, Details], str]]] = {
    Event.REVISION_PUBLISHED: _revision_fault,
    Event.ROUND_PLANNED: _plan_fault,
    Event.DELTA_ADMITTED: _delta_fault,
}
