"""The records of rounds and assignments, and the one transaction that publishes a round."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from sqlalchemy import ColumnElement, Connection, bindparam, exists, insert, select, update

from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_server.chain import SERVER, Event
from fedra_server.errors import ConflictError, NotFoundError
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage import tables
from fedra_server.storage.clients import find_client
from fedra_server.storage.database import Database
from fedra_server.storage.journal import write_entry
from fedra_server.storage.records import (
    AssignmentRecord,
    MergeRecord,
    RevisionRecord,
    RoundRecord,
)
from fedra_server.storage.round_entries import tell_delta, tell_plan, tell_publication
from fedra_server.storage.rows import (
    assignment_record,
    assignment_values,
    merge_values,
    revision_values,
    round_record,
    round_values,
)
from fedra_server.storage.screenings import (
    NOTHING_SCREENED,
    Screening,
    tell_screening,
    write_screening,
)
from fedra_server.storage.tokens import require_member

_ROUNDS = tables.rounds.c
_ASSIGNMENTS = tables.assignments.c
_ASSIGNMENT = select(tables.assignments).where(_ASSIGNMENTS.assignment_id == bindparam("wanted"))
_OPEN_ASSIGNMENT = (
    select(tables.assignments)
    .where(
        _ASSIGNMENTS.client_id == bindparam("client"),
        _ASSIGNMENTS.state == AssignmentState.PENDING.value,
    )
    .order_by(_ASSIGNMENTS.issued_at)
    .limit(1)
)
_ASSIGNMENTS_OF = (
    select(tables.assignments)
    .where(
        _ASSIGNMENTS.run == bindparam("run_name"),
        _ASSIGNMENTS.round_number == bindparam("number"),
        _ASSIGNMENTS.client_id == bindparam("client"),
    )
    .order_by(_ASSIGNMENTS.issued_at, _ASSIGNMENTS.assignment_id)
)
_OPEN_ROUND = select(tables.rounds).where(
    _ROUNDS.run == bindparam("run_name"), _ROUNDS.published_at.is_(None)
)
_ROUND = select(tables.rounds).where(
    _ROUNDS.run == bindparam("run_name"), _ROUNDS.number == bindparam("wanted_number")
)
_CLOSE_ROUND = (
    update(tables.rounds)
    .where(_ROUNDS.run == bindparam("run_name"), _ROUNDS.number == bindparam("wanted_number"))
    .values(published_at=bindparam("now"))
)
_LOCK_RUN = (
    select(tables.runs.c.run).where(tables.runs.c.run == bindparam("run_name")).with_for_update()
)
_IS_LEFT = select(
    exists().where(
        _ASSIGNMENTS.run == bindparam("run_name"),
        _ASSIGNMENTS.state == AssignmentState.ADMITTED.value,
    )
)
_ONLY_PENDING = frozenset({AssignmentState.PENDING})
_ROWS_AT_ONCE = 500
_NOT_AWAITED = "the round did not wait any longer"


@dataclass(frozen=True)
class Publication:
    """What one merge changes: all of it becomes true at once, or nothing.

    ``merged`` are the deltas of which no piece waits any more, ``expired`` the assignments whose
    deltas would be too stale from now on. One that ``leaves_none`` must have taken every delta
    that is admitted. ``screening`` is what was judged for it.
    """

    revision: RevisionRecord
    merges: Sequence[MergeRecord]
    merged: Sequence[AssignmentId]
    expired: Sequence[AssignmentId]
    leaves_none: bool
    finishes_run: bool
    screening: Screening = NOTHING_SCREENED


class RoundRecords(Database):
    """Every method is one transaction.

    Whatever changes a round or one of its assignments locks the run's row first, so that a delta
    is either settled before a revision is published or sees that it is.
    """

    def open_round(self, record: RoundRecord, assignments: Sequence[AssignmentRecord]) -> None:
        """Open a round and hand out its work.

        Raises:
            ConflictError: The run has an open round, or had one of this number.
        """
        with self.writing() as connection:
            _lock_run(connection, record.run)
            if _current_round(connection, record.run) is not None:
                raise ConflictError(f"run {record.run!r} has an open round already")
            connection.execute(insert(tables.rounds), round_values(record))
            _insert_assignments(connection, assignments)
            tell_plan(connection, record, assignments)

    def extend_round(  # noqa: PLR0913 - all of an extension is one transaction
        self,
        run: str,
        number: int,
        *,
        deadline_at: float,
        draws: int,
        assignments: Sequence[AssignmentRecord],
        expire: Collection[AssignmentId],
        now: float,
    ) -> RoundRecord:
        """Give an open round a later deadline and further participants.

        Of ``expire`` only those still pending expire; what was admitted stays admitted.

        Raises:
            NotFoundError: No such round.
            ConflictError: The round is published.
        """
        change = update(tables.rounds).where(_ROUNDS.run == run, _ROUNDS.number == number)
        with self.writing() as connection:
            _lock_run(connection, run)
            _open_round(connection, run, number)
            connection.execute(change.values(deadline_at=deadline_at, draws=draws))
            _expire(connection, expire, now)
            _insert_assignments(connection, assignments)
            extended = _open_round(connection, run, number)
            tell_plan(connection, extended, assignments)
            return extended

    def current_round(self, run: str) -> RoundRecord | None:
        """Give the round that is not published yet, if there is one."""
        return self.read_once(("round", run), lambda connection: _current_round(connection, run))

    def rounds(self, run: str) -> list[RoundRecord]:
        """Give all rounds of a run, oldest first."""
        with self.reading() as connection:
            return find_rounds(connection, run)

    def assignments(self, run: str, round_number: int | None = None) -> list[AssignmentRecord]:
        """Give a round's assignments in the order they were handed out, or the whole run's."""
        with self.reading() as connection:
            return find_assignments(connection, run, round_number)

    def assignments_of(
        self, client_id: ClientId, run: str, round_number: int
    ) -> list[AssignmentRecord]:
        """Give what one client was assigned in a round, oldest first."""
        wanted = {"client": client_id, "run_name": run, "number": round_number}
        with self.reading() as connection:
            rows = connection.execute(_ASSIGNMENTS_OF, wanted).all()
        return [assignment_record(row) for row in rows]

    def assignment(self, assignment_id: AssignmentId) -> AssignmentRecord:
        """Give an assignment.

        Raises:
            NotFoundError: No such assignment.
        """
        key = ("assignment", assignment_id)
        return self.read_once(key, lambda connection: _assignment(connection, assignment_id))

    def open_assignment(self, client_id: ClientId) -> AssignmentRecord | None:
        """Give the work that a client has not settled yet and that is still wanted."""
        with self.reading() as connection:
            row = connection.execute(_OPEN_ASSIGNMENT, {"client": client_id}).first()
        return None if row is None else assignment_record(row)

    def dismiss(self, run: str, detail: str, now: float) -> int:
        """Let everybody go who is at work on a run; tell how many there were."""
        pending = (_ASSIGNMENTS.run == run) & (_ASSIGNMENTS.state == AssignmentState.PENDING.value)
        values = {"state": AssignmentState.EXPIRED.value, "detail": detail, "settled_at": now}
        with self.reading() as connection:
            if not connection.scalar(select(exists().where(pending))):
                return 0
        with self.writing() as connection:
            _lock_run(connection, run)
            change = update(tables.assignments).where(pending).values(values)
            return connection.execute(change).rowcount

    def settle(
        self,
        assignment_id: AssignmentId,
        state: AssignmentState,
        detail: str,
        now: float,
        *,
        delta: DeltaManifest | None = None,
        only_from: Collection[AssignmentState] = _ONLY_PENDING,
    ) -> AssignmentRecord:
        """Record how an assignment ended: admitted with its delta, refused, failed or expired.

        The ``delta`` that was received is kept in the record when it is admitted.

        Raises:
            NotFoundError: No such assignment.
            ConflictError: Its state is none of ``only_from``.
            RefusedError: It would be admitted, and its client's membership is over.
        """
        change = update(tables.assignments).where(
            _ASSIGNMENTS.assignment_id == assignment_id,
            _ASSIGNMENTS.state.in_([source.value for source in only_from]),
        )
        values: dict[str, object] = {"state": state.value, "detail": detail, "settled_at": now}
        if delta is not None and state is AssignmentState.ADMITTED:
            values["delta"] = delta.model_dump_json()
        with self.writing() as connection:
            before = _assignment(connection, assignment_id)
            _lock_run(connection, before.run)
            if state is AssignmentState.ADMITTED:
                require_member(find_client(connection, before.client_id))
            is_changed = connection.execute(change.values(values)).rowcount == 1
            after = _assignment(connection, assignment_id)
            if not is_changed:
                raise ConflictError(f"assignment {assignment_id} is {after.state} already")
            tell_delta(connection, after, delta)
            return after

    def publish(self, publication: Publication, round_number: int, now: float) -> None:
        """End a round: its revision exists, what was merged is recorded, others are let go.

        Raises:
            NotFoundError: No such round.
            ConflictError: The round is published already, a piece was merged before, or a delta
                would be left behind by a publication that leaves none.
        """
        run = publication.revision.run
        admitted = _ASSIGNMENTS.state == AssignmentState.ADMITTED.value
        with self.writing() as connection:
            _lock_run(connection, run)
            _open_round(connection, run, round_number)
            connection.execute(insert(tables.revisions), revision_values(publication.revision))
            for start in range(0, len(publication.merges), _ROWS_AT_ONCE):
                some = publication.merges[start : start + _ROWS_AT_ONCE]
                connection.execute(insert(tables.merges), [merge_values(it) for it in some])
            _set_state(connection, publication.merged, admitted, AssignmentState.MERGED)
            write_screening(connection, publication.screening, now)
            if publication.leaves_none and connection.scalar(_IS_LEFT, {"run_name": run}):
                raise ConflictError(f"round {round_number} admitted other deltas than were merged")
            _expire(connection, publication.expired, now)
            _close_round(connection, run, round_number, now)
            tell_screening(connection, publication.screening)
            tell_publication(connection, publication.revision, publication.merges)
            if publication.finishes_run:
                _finish_run(connection, run)
            fault_point("publish.written")


def find_rounds(connection: Connection, run: str) -> list[RoundRecord]:
    """Read a run's rounds inside a transaction, oldest first."""
    query = select(tables.rounds).where(_ROUNDS.run == run).order_by(_ROUNDS.number)
    return [round_record(row) for row in connection.execute(query).all()]


def find_assignments(
    connection: Connection, run: str, round_number: int | None = None
) -> list[AssignmentRecord]:
    """Read a round's assignments, or the whole run's, inside a transaction."""
    query = select(tables.assignments).where(_ASSIGNMENTS.run == run)
    if round_number is not None:
        query = query.where(_ASSIGNMENTS.round_number == round_number)
    query = query.order_by(
        _ASSIGNMENTS.round_number, _ASSIGNMENTS.issued_at, _ASSIGNMENTS.assignment_id
    )
    return [assignment_record(row) for row in connection.execute(query).all()]


def _current_round(connection: Connection, run: str) -> RoundRecord | None:
    row = connection.execute(_OPEN_ROUND, {"run_name": run}).one_or_none()
    return None if row is None else round_record(row)


def _lock_run(connection: Connection, run: str) -> None:
    """Lock a run's row to the end of the transaction; SQLite's writer holds the whole file."""
    if connection.execute(_LOCK_RUN, {"run_name": run}).one_or_none() is None:
        raise NotFoundError(f"there is no run {run!r}")


def _open_round(connection: Connection, run: str, number: int) -> RoundRecord:
    wanted = {"run_name": run, "wanted_number": number}
    row = connection.execute(_ROUND, wanted).one_or_none()
    if row is None:
        raise NotFoundError(f"run {run!r} has no round {number}")
    if row.published_at is not None:
        raise ConflictError(f"round {number} of run {run!r} is published")
    return round_record(row)


def _assignment(connection: Connection, assignment_id: AssignmentId) -> AssignmentRecord:
    row = connection.execute(_ASSIGNMENT, {"wanted": assignment_id}).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no assignment {assignment_id}")
    return assignment_record(row)


def _insert_assignments(connection: Connection, records: Sequence[AssignmentRecord]) -> None:
    if records:
        connection.execute(insert(tables.assignments), [assignment_values(r) for r in records])


def _expire(connection: Connection, which: Collection[AssignmentId], now: float) -> None:
    """Let go of those that are still pending."""
    pending = _ASSIGNMENTS.state == AssignmentState.PENDING.value
    values = {"detail": _NOT_AWAITED, "settled_at": now}
    _set_state(connection, which, pending, AssignmentState.EXPIRED, values)


def _set_state(
    connection: Connection,
    which: Collection[AssignmentId],
    condition: ColumnElement[bool],
    state: AssignmentState,
    values: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Move assignments on, however many, where the condition still holds."""
    if which:
        chosen = _ASSIGNMENTS.assignment_id == bindparam("chosen")
        change = update(tables.assignments).where(chosen & condition)
        rows = [{"chosen": assignment_id} for assignment_id in which]
        connection.execute(change.values(state=state.value, **values), rows)


def _close_round(connection: Connection, run: str, number: int, now: float) -> None:
    connection.execute(_CLOSE_ROUND, {"run_name": run, "wanted_number": number, "now": now})


def _finish_run(connection: Connection, run: str) -> None:
    """End a run, unless the operator stopped it meanwhile."""
    alive = [RunState.RUNNING.value, RunState.PAUSED.value]
    change = update(tables.runs).where(tables.runs.c.run == run, tables.runs.c.state.in_(alive))
    if connection.execute(change.values(state=RunState.FINISHED.value)).rowcount:
        write_entry(connection, Event.RUN_FINISHED, run, SERVER)
