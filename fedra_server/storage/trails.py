"""All that an audit reads of a run, as of one moment, and none of what it does not need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Select, and_, func, not_, or_, select

from fedra_edge.protocol.ids import AssignmentId, ClientId, LayerId
from fedra_edge.protocol.models import BlobRef
from fedra_server.errors import NotFoundError
from fedra_server.publishing import trained_pieces
from fedra_server.runs import AssignmentState
from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.records import (
    MergeRecord,
    ModelRecord,
    RevisionRecord,
    RoundRecord,
    RunRecord,
    ScreeningRecord,
)
from fedra_server.storage.rounds import find_rounds
from fedra_server.storage.rows import AnyRow, merge_record, model_record
from fedra_server.storage.runs import find_revisions, find_run
from fedra_server.storage.screenings import find_screenings

_ROWS_AT_ONCE: Final = 200
_ASSIGNMENTS = tables.assignments.c
_MERGES = tables.merges.c


@dataclass(frozen=True, slots=True)
class WorkTrail:
    """An assignment: what it trained and how it ended; ``delta`` is the file it was admitted with.

    ``num_examples`` is 0 as long as there is no delta.
    """

    assignment_id: AssignmentId
    round_number: int
    base_revision: int
    pieces: tuple[str, ...]
    chance: float
    state: AssignmentState
    delta: BlobRef | None
    num_examples: int
    client_id: ClientId


@dataclass(frozen=True)
class RunTrail:
    """A run with what it published, and out of what; merges by revision and assignment.

    ``screenings`` are in the order of judging.
    """

    run: RunRecord
    model: ModelRecord
    revisions: list[RevisionRecord]
    rounds: dict[int, RoundRecord]
    work: dict[AssignmentId, WorkTrail]
    merges: dict[int, list[MergeRecord]]
    screenings: list[ScreeningRecord]


class Trails(Database):
    """Every method is one transaction."""

    def run_names(self) -> list[str]:
        """Give the names of all runs, in the order they were created."""
        query = select(tables.runs.c.run).order_by(tables.runs.c.created_at, tables.runs.c.run)
        with self.reading() as connection:
            return list(connection.scalars(query))

    def trail(self, run: str) -> RunTrail:
        """Give the trail of a run.

        Raises:
            NotFoundError: No such run, or its model is gone.
        """
        work: Select[Any] = select(
            _ASSIGNMENTS.assignment_id,
            _ASSIGNMENTS.round_number,
            _ASSIGNMENTS.manifest,
            _ASSIGNMENTS.chance,
            _ASSIGNMENTS.state,
            _ASSIGNMENTS.delta,
            _ASSIGNMENTS.client_id,
        ).where(_ASSIGNMENTS.run == run)
        with self.reading() as connection:
            record = find_run(connection, run)
            model = select(tables.models).where(tables.models.c.model_id == record.model_id)
            model_row = connection.execute(model).one_or_none()
            if model_row is None:
                raise NotFoundError(f"run {run} is of a model that is gone")
            rows = connection.execute(work.execution_options(yield_per=_ROWS_AT_ONCE))
            return RunTrail(
                run=record,
                model=model_record(model_row),
                work={item.assignment_id: item for item in (_work(row) for row in rows)},
                revisions=find_revisions(connection, run),
                rounds={item.number: item for item in find_rounds(connection, run)},
                merges=_merges(connection, run),
                screenings=find_screenings(connection, run),
            )

    def dangling_rows(self) -> Iterator[tuple[str, str, int]]:
        """Give table, what it refers to, and how many rows refer to nothing there.

        Databases guard this themselves, unless somebody wrote to them past this software.
        """
        with self.reading() as connection:
            for table in tables.METADATA.sorted_tables:
                for constraint in table.foreign_key_constraints:
                    target = constraint.referred_table.alias()
                    pairs = [(key.parent, target.c[key.column.name]) for key in constraint.elements]
                    matches = and_(*(column == other for column, other in pairs))
                    is_set: ColumnElement[bool] = or_(*(column.is_not(None) for column, _ in pairs))
                    is_there = select(1).select_from(target).where(matches).exists()
                    count = connection.scalar(
                        select(func.count()).select_from(table).where(is_set, not_(is_there))
                    )
                    if count:
                        yield table.name, constraint.referred_table.name, count


def _merges(connection: Connection, run: str) -> dict[int, list[MergeRecord]]:
    """Give a run's merges by revision, in the order in which sums are taken.

    Databases sort texts by rules of their own, so the order is made here.
    """
    query = select(tables.merges).where(_MERGES.run == run)
    found: dict[int, list[MergeRecord]] = {}
    for row in connection.execute(query.execution_options(yield_per=_ROWS_AT_ONCE)):
        found.setdefault(row.revision, []).append(merge_record(row))
    for merges in found.values():
        merges.sort(key=lambda merge: (merge.assignment_id, merge.piece))
    return dict(sorted(found.items()))


def _work(row: AnyRow) -> WorkTrail:
    """Read what matters of an assignment without checking the whole manifest again."""
    manifest = json.loads(row.manifest)
    layers = [layer for layer in manifest["layers"] if layer["role"] == "train"]
    delta = None if row.delta is None else json.loads(row.delta)
    return WorkTrail(
        assignment_id=AssignmentId(row.assignment_id),
        round_number=row.round_number,
        base_revision=manifest["revision"]["number"],
        pieces=trained_pieces(tuple(LayerId(layer["layer_id"]) for layer in layers)),
        chance=row.chance,
        state=AssignmentState(row.state),
        delta=None
        if delta is None
        else BlobRef(sha256=delta["sha256"], size_bytes=delta["size_bytes"]),
        num_examples=0 if delta is None else delta["num_examples"],
        client_id=ClientId(row.client_id),
    )
