"""What the records refer to, hence what must stay on the disk, and what an operator lets go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Text,
    and_,
    case,
    func,
    or_,
    select,
    update,
)

from fedra_server.chain import COMMAND, Event
from fedra_server.runs import AssignmentState
from fedra_server.storage import tables
from fedra_server.storage.blobs import DIGEST
from fedra_server.storage.database import Database
from fedra_server.storage.journal import write_entry
from fedra_server.storage.runs import find_run

_RUNS = tables.runs.c
_REVISIONS = tables.revisions.c
_ASSIGNMENTS = tables.assignments.c
_UNSETTLED: Final = (AssignmentState.PENDING.value, AssignmentState.ADMITTED.value)
_DONE_WITH: Final = (AssignmentState.MERGED.value, AssignmentState.DISCARDED.value)
_ROWS_AT_ONCE: Final = 200


@dataclass(frozen=True)
class Cut:
    """Deltas merged into revisions up to ``through`` only are let go, and earlier adapters."""

    run: str
    through: int


class Retention(Database):
    """Every method is one transaction.

    ``planned`` asks what would hold if a cut were made already.
    """

    def referenced_digests(self, planned: Cut | None = None) -> Iterator[str]:
        """Give every digest that a record names, some more than once.

        Whatever looks like a digest counts, so that no kind of reference can be forgotten.
        """
        with self.reading() as connection:
            for query in _referring(planned):
                for row in connection.execute(query.execution_options(yield_per=_ROWS_AT_ONCE)):
                    for text in row:
                        yield from DIGEST.findall(text or "")

    def delta_needs(
        self, refused_before: float, planned: Cut | None = None
    ) -> Iterator[tuple[str, bool]]:
        """Give the id of every assignment, and whether a delta file of it is still needed.

        It is not once it was refused before a moment, or is merged or discarded, and what was
        merged of it is let go. What is quarantined stays.
        """
        merged_last = (
            select(func.max(tables.merges.c.revision))
            .where(tables.merges.c.assignment_id == _ASSIGNMENTS.assignment_id)
            .scalar_subquery()
        )
        is_refused = and_(
            _ASSIGNMENTS.state == AssignmentState.REFUSED.value,
            _ASSIGNMENTS.settled_at < refused_before,
            func.coalesce(merged_last, 0) <= _pruned_through(planned),
        )
        is_let_go = and_(
            _ASSIGNMENTS.state.in_(_DONE_WITH),
            func.coalesce(merged_last, _ASSIGNMENTS.round_number) <= _pruned_through(planned),
        )
        is_over = case((or_(is_refused, is_let_go), 1), else_=0)
        query = select(_ASSIGNMENTS.assignment_id, is_over).join(
            tables.runs, _RUNS.run == _ASSIGNMENTS.run
        )
        with self.reading() as connection:
            for assignment_id, over in connection.execute(
                query.execution_options(yield_per=_ROWS_AT_ONCE)
            ):
                yield assignment_id, not over

    def unrecorded_deltas(self) -> set[str]:
        """Name the assignments whose delta would still be taken, hence none of theirs counts."""
        states = [
            state.value
            for state in (AssignmentState.PENDING, AssignmentState.FAILED, AssignmentState.EXPIRED)
        ]
        query = select(_ASSIGNMENTS.assignment_id).where(_ASSIGNMENTS.state.in_(states))
        with self.reading() as connection:
            return set(connection.scalars(query))

    def cut_keeping(self, run: str, keep_revisions: int) -> Cut:
        """Work out the cut that leaves a run so many revisions; never one above an earlier cut.

        Raises:
            NotFoundError: No such run.
        """
        with self.reading() as connection:
            return _cut(connection, run, keep_revisions)

    def make_cut(self, run: str, keep_revisions: int) -> Cut:
        """Let go of all but the newest revisions of a run.

        Raises:
            NotFoundError: No such run.
        """
        with self.writing() as connection:
            cut = _cut(connection, run, keep_revisions)
            change = update(tables.runs).where(_RUNS.run == run)
            connection.execute(change.values(pruned_through=cut.through))
            write_entry(connection, Event.RUN_PRUNED, run, COMMAND, {"through": cut.through})
            return cut


def _cut(connection: Connection, run: str, keep_revisions: int) -> Cut:
    newest = select(func.max(_REVISIONS.number)).where(_REVISIONS.run == run)
    pruned_through = find_run(connection, run).pruned_through
    newest_number = connection.execute(newest).scalar_one()
    return Cut(run, max(pruned_through, newest_number + 1 - keep_revisions))


def _pruned_through(planned: Cut | None) -> ColumnElement[int]:
    """The cut of each row's run, or the planned one."""
    if planned is None:
        return _RUNS.pruned_through
    return case((_RUNS.run == planned.run, planned.through), else_=_RUNS.pruned_through)


def _referring(planned: Cut | None) -> Iterator[Select[tuple[str, ...]]]:
    """All texts that may name a blob which must stay."""
    texts = [column for column in _REVISIONS if isinstance(column.type, Text)]
    yield select(tables.models.c.spec)
    yield select(_RUNS.spec)
    yield (
        select(*texts)
        .join(tables.runs, _RUNS.run == _REVISIONS.run)
        .where(_REVISIONS.number >= _pruned_through(planned))
    )
    yield select(_ASSIGNMENTS.manifest).where(_ASSIGNMENTS.state.in_(_UNSETTLED))
