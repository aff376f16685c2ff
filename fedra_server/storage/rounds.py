"""The records of rounds and assignments, and the one transaction that publishes a round."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, Connection, insert, select, update

from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_server.errors import ConflictError, NotFoundError
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.records import AssignmentRecord, RevisionRecord, RoundRecord
from fedra_server.storage.rows import (
    assignment_record,
    assignment_values,
    revision_values,
    round_record,
    round_values,
)

_ROUNDS = tables.rounds.c
_ASSIGNMENTS = tables.assignments.c
_ONLY_PENDING = frozenset({AssignmentState.PENDING})


class RoundRecords(Database):
    """Every method is one transaction.

    Whatever changes a round or one of its assignments locks the round's row first, so that
    a delta is either settled before its round is published or finds the round closed.
    """

    def open_round(self, record: RoundRecord, assignments: Sequence[AssignmentRecord]) -> None:
        """Open a round and hand out its work.

        Raises:
            ConflictError: The run has an open round, or had one of this number.
        """
        with self.writing() as connection:
            if _current_round(connection, record.run) is not None:
                raise ConflictError(f"run {record.run!r} has an open round already")
            connection.execute(insert(tables.rounds).values(round_values(record)))
            _insert_assignments(connection, assignments)

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
            _lock_open_round(connection, run, number)
            connection.execute(change.values(deadline_at=deadline_at, draws=draws))
            _expire(connection, _ASSIGNMENTS.assignment_id.in_(list(expire)), now)
            _insert_assignments(connection, assignments)
            return _lock_open_round(connection, run, number)

    def current_round(self, run: str) -> RoundRecord | None:
        """Give the round that is not published yet, if there is one."""
        with self.reading() as connection:
            return _current_round(connection, run)

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
        query = (
            select(tables.assignments)
            .where(
                _ASSIGNMENTS.run == run,
                _ASSIGNMENTS.round_number == round_number,
                _ASSIGNMENTS.client_id == client_id,
            )
            .order_by(_ASSIGNMENTS.issued_at, _ASSIGNMENTS.assignment_id)
        )
        with self.reading() as connection:
            return [assignment_record(row) for row in connection.execute(query).all()]

    def assignment(self, assignment_id: AssignmentId) -> AssignmentRecord:
        """Give an assignment.

        Raises:
            NotFoundError: No such assignment.
        """
        with self.reading() as connection:
            return _assignment(connection, assignment_id)

    def open_assignment(self, client_id: ClientId) -> AssignmentRecord | None:
        """Give the work a client has not settled yet, in a round that still waits for it."""
        query = (
            select(tables.assignments)
            .join(tables.rounds)
            .where(
                _ASSIGNMENTS.client_id == client_id,
                _ASSIGNMENTS.state == AssignmentState.PENDING.value,
                _ROUNDS.published_at.is_(None),
            )
            .order_by(_ASSIGNMENTS.issued_at)
            .limit(1)
        )
        with self.reading() as connection:
            row = connection.execute(query).first()
        return None if row is None else assignment_record(row)

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

        Raises:
            NotFoundError: No such assignment.
            ConflictError: Its round is published, or its state is none of ``only_from``.
        """
        change = update(tables.assignments).where(
            _ASSIGNMENTS.assignment_id == assignment_id,
            _ASSIGNMENTS.state.in_([source.value for source in only_from]),
        )
        values: dict[str, object] = {"state": state.value, "detail": detail, "settled_at": now}
        if delta is not None:
            values["delta"] = delta.model_dump_json()
        with self.writing() as connection:
            before = _assignment(connection, assignment_id)
            _lock_open_round(connection, before.run, before.round_number)
            is_changed = connection.execute(change.values(values)).rowcount == 1
            after = _assignment(connection, assignment_id)
            if not is_changed:
                raise ConflictError(f"assignment {assignment_id} is {after.state} already")
            return after

    def publish(
        self,
        revision: RevisionRecord,
        run: str,
        round_number: int,
        *,
        merged: Collection[AssignmentId],
        now: float,
        finishes_run: bool,
    ) -> None:
        """End a round: its revision exists, its deltas are merged, what is pending expires.

        Raises:
            NotFoundError: No such round.
            ConflictError: The round is published already, or ``merged`` is not exactly the set
                of its admitted assignments, so that a delta would be lost or merged twice.
        """
        in_round = (_ASSIGNMENTS.run == run) & (_ASSIGNMENTS.round_number == round_number)
        admitted = in_round & (_ASSIGNMENTS.state == AssignmentState.ADMITTED.value)
        with self.writing() as connection:
            _lock_open_round(connection, run, round_number)
            ids = connection.scalars(select(_ASSIGNMENTS.assignment_id).where(admitted)).all()
            if set(ids) != set(merged):
                raise ConflictError(f"round {round_number} admitted other deltas than were merged")
            connection.execute(
                update(tables.assignments)
                .where(admitted)
                .values(state=AssignmentState.MERGED.value)
            )
            _expire(connection, in_round, now)
            connection.execute(insert(tables.revisions).values(revision_values(revision)))
            _close_round(connection, run, round_number, now)
            if finishes_run:
                _finish_run(connection, run)


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
    query = select(tables.rounds).where(_ROUNDS.run == run, _ROUNDS.published_at.is_(None))
    row = connection.execute(query).one_or_none()
    return None if row is None else round_record(row)


def _lock_open_round(connection: Connection, run: str, number: int) -> RoundRecord:
    """Lock a round's row to the end of the transaction; SQLite's writer holds the whole file."""
    query = select(tables.rounds).where(_ROUNDS.run == run, _ROUNDS.number == number)
    row = connection.execute(query.with_for_update()).one_or_none()
    if row is None:
        raise NotFoundError(f"run {run!r} has no round {number}")
    if row.published_at is not None:
        raise ConflictError(f"round {number} of run {run!r} is published")
    return round_record(row)


def _assignment(connection: Connection, assignment_id: AssignmentId) -> AssignmentRecord:
    query = select(tables.assignments).where(_ASSIGNMENTS.assignment_id == assignment_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no assignment {assignment_id}")
    return assignment_record(row)


def _insert_assignments(connection: Connection, records: Sequence[AssignmentRecord]) -> None:
    if records:
        connection.execute(insert(tables.assignments), [assignment_values(r) for r in records])


def _expire(connection: Connection, which: ColumnElement[bool], now: float) -> None:
    pending = _ASSIGNMENTS.state == AssignmentState.PENDING.value
    connection.execute(
        update(tables.assignments)
        .where(which & pending)
        .values(
            state=AssignmentState.EXPIRED.value,
            detail="the round did not wait any longer",
            settled_at=now,
        )
    )


def _close_round(connection: Connection, run: str, number: int, now: float) -> None:
    change = update(tables.rounds).where(_ROUNDS.run == run, _ROUNDS.number == number)
    connection.execute(change.values(published_at=now))


def _finish_run(connection: Connection, run: str) -> None:
    """End a run, unless the operator stopped it meanwhile."""
    alive = [RunState.RUNNING.value, RunState.PAUSED.value]
    change = update(tables.runs).where(tables.runs.c.run == run, tables.runs.c.state.in_(alive))
    connection.execute(change.values(state=RunState.FINISHED.value))
