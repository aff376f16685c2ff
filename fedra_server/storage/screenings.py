"""The records of screening, and what an operator decides about quarantined deltas."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from sqlalchemy import Connection, Select, and_, bindparam, delete, func, insert, select, update

from fedra_edge.protocol.ids import AssignmentId
from fedra_server.chain import COMMAND, SERVER, Event
from fedra_server.errors import ConflictError, NotFoundError
from fedra_server.rounds import staleness
from fedra_server.runs import AssignmentState, RunState
from fedra_server.screening import Outcome, Verdict
from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.journal import Happening, write_entries
from fedra_server.storage.records import AssignmentRecord, ScreeningRecord
from fedra_server.storage.rows import (
    AnyRow,
    assignment_record,
    screening_record,
    screening_values,
)
from fedra_server.storage.runs import find_revisions, find_run

_ASSIGNMENTS = tables.assignments.c
_SCREENINGS = tables.screenings.c
_HELD = and_(_SCREENINGS.verdict == Verdict.QUARANTINED.value, _SCREENINGS.outcome.is_(None))
_ROWS_AT_ONCE: Final = 500
_FORGET = delete(tables.screenings).where(
    _SCREENINGS.assignment_id == bindparam("judged"), _SCREENINGS.piece == bindparam("judged_piece")
)
_OF_ADMITTED = (
    select(tables.screenings)
    .join(tables.assignments, _ASSIGNMENTS.assignment_id == _SCREENINGS.assignment_id)
    .where(
        _ASSIGNMENTS.run == bindparam("wanted_run"),
        _ASSIGNMENTS.state == AssignmentState.ADMITTED.value,
    )
    .execution_options(yield_per=_ROWS_AT_ONCE)
)
_OPEN: Final = frozenset({RunState.RUNNING, RunState.PAUSED})
_LIST: Final = "See `fedra-server quarantine list`."

Key = tuple[AssignmentId, str]


@dataclass(frozen=True)
class Screening:
    """What judging deltas changes; ``quarantined`` says why, of deltas that wait for nothing else.

    ``discarded`` are those that wait for nothing any more, of which the operator discarded what
    was quarantined.
    """

    records: Sequence[ScreeningRecord] = ()
    quarantined: Mapping[AssignmentId, str] = field(default_factory=dict)
    discarded: Sequence[AssignmentId] = ()


NOTHING_SCREENED: Final = Screening()


class ScreeningRecords(Database):
    """Every method is one transaction."""

    def screenings_of_admitted(self, run: str) -> dict[Key, ScreeningRecord]:
        """Give what was judged of the deltas of a run that wait to be merged."""
        with self.reading() as connection:
            return find_screenings_of_admitted(connection, run)

    def next_judgement(self, run: str) -> int:
        """Number the next judgement of a run."""
        query = select(func.max(_SCREENINGS.judgement)).where(_SCREENINGS.run == run)
        with self.reading() as connection:
            return (connection.scalar(query) or 0) + 1

    def held_screenings(self, run: str | None = None) -> list[ScreeningRecord]:
        """Give what is quarantined and waits for an operator, oldest first."""
        query = select(tables.screenings).where(_HELD)
        if run is not None:
            query = query.where(_SCREENINGS.run == run)
        with self.reading() as connection:
            return _records(connection, query)

    def screenings_of(self, assignment_id: AssignmentId) -> list[ScreeningRecord]:
        """Give what was judged of one delta."""
        query = select(tables.screenings).where(_SCREENINGS.assignment_id == assignment_id)
        with self.reading() as connection:
            return _records(connection, query)

    def merged_in(self, assignment_id: AssignmentId) -> dict[str, int]:
        """Give the revision that each merged piece of a delta went into."""
        merges = tables.merges.c
        query = select(merges.piece, merges.revision).where(merges.assignment_id == assignment_id)
        with self.reading() as connection:
            return {row.piece: row.revision for row in connection.execute(query)}

    def record_screening(self, run: str, screening: Screening, now: float) -> None:
        """Record a judgement after which nothing is left to publish."""
        with self.writing() as connection:
            _lock_run(connection, run)
            write_screening(connection, screening, now)
            tell_screening(connection, screening)

    def release(self, assignment_id: AssignmentId, by: str = COMMAND) -> list[ScreeningRecord]:
        """Let the quarantined pieces of a delta be merged with the next publication.

        Raises:
            NotFoundError: Nothing of it is quarantined.
            ConflictError: Its run is over, or a piece is too stale by now.
        """
        with self.writing() as connection:
            assignment, held = _held(connection, assignment_id)
            _refuse_unless_welcome(connection, assignment, [row.piece for row in held])
            _decide(connection, held, Outcome.RELEASED)
            change = update(tables.assignments).where(
                _ASSIGNMENTS.assignment_id == assignment_id,
                _ASSIGNMENTS.state == AssignmentState.QUARANTINED.value,
            )
            connection.execute(change.values(state=AssignmentState.ADMITTED.value, detail=""))
            _tell(connection, Event.DELTA_RELEASED, assignment, held, by)
            return held

    def discard(self, assignment_id: AssignmentId, by: str = COMMAND) -> list[ScreeningRecord]:
        """Decide that the quarantined pieces of a delta are never merged.

        Raises:
            NotFoundError: Nothing of it is quarantined.
        """
        with self.writing() as connection:
            assignment, held = _held(connection, assignment_id)
            _decide(connection, held, Outcome.DISCARDED)
            if assignment.state is AssignmentState.QUARANTINED:
                state = AssignmentState.DISCARDED.value
                change = update(tables.assignments).where(
                    _ASSIGNMENTS.assignment_id == assignment_id
                )
                connection.execute(change.values(state=state))
            _tell(connection, Event.DELTA_DISCARDED, assignment, held, by)
            return held


def find_screenings_of_admitted(connection: Connection, run: str) -> dict[Key, ScreeningRecord]:
    """Read inside a transaction what was judged of deltas that wait to be merged."""
    rows = connection.execute(_OF_ADMITTED, {"wanted_run": run})
    found = (screening_record(row) for row in rows)
    return {(it.assignment_id, it.piece): it for it in found}


def find_screenings(connection: Connection, run: str) -> list[ScreeningRecord]:
    """Read all of a run inside a transaction, in the order of judging."""
    return _records(connection, select(tables.screenings).where(_SCREENINGS.run == run))


def write_screening(connection: Connection, screening: Screening, now: float) -> None:
    """Write what was judged, in place of what was known of the same pieces."""
    for start in range(0, len(screening.records), _ROWS_AT_ONCE):
        some = screening.records[start : start + _ROWS_AT_ONCE]
        keys = [{"judged": it.assignment_id, "judged_piece": it.piece} for it in some]
        connection.execute(_FORGET, keys)
        connection.execute(insert(tables.screenings), [screening_values(it) for it in some])
    for assignment_id, detail in screening.quarantined.items():
        _end(connection, assignment_id, AssignmentState.QUARANTINED, detail, now)
    for assignment_id in screening.discarded:
        _end(connection, assignment_id, AssignmentState.DISCARDED, "discarded in part", now)


def tell_screening(connection: Connection, screening: Screening) -> None:
    """Tell the journal what was quarantined."""
    held: defaultdict[AssignmentId, list[str]] = defaultdict(list)
    for record in screening.records:
        if record.is_held:
            held[record.assignment_id].append(record.piece)
    if held:
        write_entries(
            connection,
            *(
                Happening(
                    Event.DELTA_QUARANTINED, assignment_id, SERVER,
                    {"pieces": ",".join(pieces), "code": "screening"},
                )
                for assignment_id, pieces in held.items()
            ),
        )  # fmt: skip


def _records(connection: Connection, query: Select[tuple[object, ...]]) -> list[ScreeningRecord]:
    """Read rows in an order that every database makes alike."""
    rows: Iterable[AnyRow] = connection.execute(query.execution_options(yield_per=_ROWS_AT_ONCE))
    found = [screening_record(row) for row in rows]
    return sorted(found, key=lambda it: (it.judged_at, it.judgement, it.assignment_id, it.piece))


def _end(
    connection: Connection,
    assignment_id: AssignmentId,
    state: AssignmentState,
    detail: str,
    now: float,
) -> None:
    change = update(tables.assignments).where(
        _ASSIGNMENTS.assignment_id == assignment_id,
        _ASSIGNMENTS.state == AssignmentState.ADMITTED.value,
    )
    connection.execute(change.values(state=state.value, detail=detail, settled_at=now))


def _held(
    connection: Connection, assignment_id: AssignmentId
) -> tuple[AssignmentRecord, list[ScreeningRecord]]:
    """Give a delta and what of it is quarantined, and keep its run for this transaction."""
    found = connection.execute(
        select(tables.assignments).where(_ASSIGNMENTS.assignment_id == assignment_id)
    ).one_or_none()
    if found is None:
        raise NotFoundError(f"there is no delta {assignment_id}", remedy=_LIST)
    assignment = assignment_record(found)
    _lock_run(connection, assignment.run)
    query = select(tables.screenings).where(_SCREENINGS.assignment_id == assignment_id, _HELD)
    held = _records(connection, query)
    if not held:
        raise NotFoundError(f"nothing of delta {assignment_id} is quarantined", remedy=_LIST)
    return assignment, held


def _refuse_unless_welcome(
    connection: Connection, assignment: AssignmentRecord, pieces: Sequence[str]
) -> None:
    run = find_run(connection, assignment.run)
    if run.state not in _OPEN:
        raise ConflictError(
            f"run {run.run!r} is {run.state} and takes no deltas any more",
            remedy="Nothing to do; discard it, or leave it where it is.",
        )
    revisions = find_revisions(connection, run.run)
    base = revisions[assignment.manifest.revision.number]
    stale = staleness(pieces, base.version_by_piece, revisions[-1].version_by_piece)
    piece = max(pieces, key=stale.__getitem__)
    if stale[piece] > run.spec.staleness_limit:
        raise ConflictError(
            f"{piece} was merged {stale[piece]} times since revision {base.manifest.number}, and "
            f"the run takes a staleness of at most {run.spec.staleness_limit}",
            remedy="Discard it; a run created with a larger --max-staleness leaves more time.",
        )


def _decide(connection: Connection, held: Iterable[ScreeningRecord], outcome: Outcome) -> None:
    for row in held:
        change = update(tables.screenings).where(
            _SCREENINGS.assignment_id == row.assignment_id, _SCREENINGS.piece == row.piece
        )
        connection.execute(change.values(outcome=outcome.value))


def _lock_run(connection: Connection, run: str) -> None:
    """Lock a run's row to the end of the transaction; SQLite's writer holds the whole file."""
    connection.execute(
        select(tables.runs.c.run).where(tables.runs.c.run == run).with_for_update()
    ).one()


def _tell(
    connection: Connection,
    event: Event,
    assignment: AssignmentRecord,
    held: Sequence[ScreeningRecord],
    by: str,
) -> None:
    details = {
        "sha256": "" if assignment.delta is None else assignment.delta.sha256,
        "pieces": ",".join(row.piece for row in held),
        "code": "screening",
    }
    write_entries(connection, Happening(event, assignment.assignment_id, by, details))
