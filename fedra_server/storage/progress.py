"""What moving a run forward must know of its work: counts and a few columns, no whole records.

A round may have thousands of assignments; what is kept of each here is small.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Select,
    and_,
    bindparam,
    case,
    func,
    select,
)

from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_edge.protocol.layers import HEAD
from fedra_edge.protocol.slices import LayerRole
from fedra_server.publishing import trained_pieces
from fedra_server.rounds import HeldSlice, Progress, Setback, WaitingDelta
from fedra_server.runs import AssignmentState
from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.records import MergeRecord
from fedra_server.storage.rows import AnyRow, merge_record
from fedra_server.storage.screenings import find_screenings_of_admitted

_ASSIGNMENTS = tables.assignments.c
_CLIENTS = tables.clients.c
_MERGES = tables.merges.c
_PENDING, _ADMITTED = AssignmentState.PENDING.value, AssignmentState.ADMITTED.value
_DELIVERED = (_ADMITTED, AssignmentState.MERGED.value)
_FAILED = tuple(
    state.value
    for state in (
        AssignmentState.FAILED,
        AssignmentState.REFUSED,
        AssignmentState.QUARANTINED,
        AssignmentState.DISCARDED,
    )
)
_ROWS_AT_ONCE = 100
_OF_RUN = _ASSIGNMENTS.run == bindparam("wanted_run")


def _is_there(seen_since: float | BindParameter[float]) -> ColumnElement[bool]:
    return _CLIENTS.is_online & ~_CLIENTS.has_left & (_CLIENTS.last_seen_at >= seen_since)


def _newest_setbacks(*which: ColumnElement[bool]) -> Select[Any]:
    """Ask for the latest failure of each client since it last delivered, and how many there are."""
    is_failed = and_(_OF_RUN, _ASSIGNMENTS.state.in_(_FAILED), *which)
    other = tables.assignments.alias()
    is_delivered = (
        (other.c.run == bindparam("wanted_run"))
        & (other.c.client_id == _ASSIGNMENTS.client_id)
        & other.c.state.in_(_DELIVERED)
    )
    delivered_at = select(func.max(other.c.settled_at)).where(is_delivered).scalar_subquery()
    last = (  # looked up once for each client, however often it failed
        select(_ASSIGNMENTS.client_id, func.coalesce(delivered_at, 0).label("delivered_at"))
        .where(is_failed)
        .group_by(_ASSIGNMENTS.client_id)
        .subquery()
    )
    newest_first = (_ASSIGNMENTS.settled_at.desc(), _ASSIGNMENTS.assignment_id.desc())
    ranked = (
        select(
            _ASSIGNMENTS.client_id,
            func.count().over(partition_by=_ASSIGNMENTS.client_id).label("failures"),
            _ASSIGNMENTS.settled_at,
            _ASSIGNMENTS.detail,
            func.row_number()
            .over(partition_by=_ASSIGNMENTS.client_id, order_by=newest_first)
            .label("place"),
        )
        .join(last, last.c.client_id == _ASSIGNMENTS.client_id)
        .where(is_failed, _ASSIGNMENTS.settled_at > last.c.delivered_at)
        .subquery()
    )
    return select(ranked).where(ranked.c.place == 1).order_by(ranked.c.settled_at)


_SETBACKS = _newest_setbacks()
_SETBACKS_OF_CLIENT = _newest_setbacks(_ASSIGNMENTS.client_id == bindparam("wanted_client"))
_COUNTS = (
    select(
        _ASSIGNMENTS.state,
        func.count(),
        func.sum(case((_is_there(bindparam("seen_since")), 1), else_=0)),
    )
    .join(tables.clients)
    .where(
        _OF_RUN,
        (_ASSIGNMENTS.state == _ADMITTED) | ((_ASSIGNMENTS.state == _PENDING) & _CLIENTS.is_online),
    )
    .group_by(_ASSIGNMENTS.state)
)
_COUNTS_OF_ROUND = _COUNTS.where(_ASSIGNMENTS.round_number == bindparam("wanted_round"))
_PARTLY_MERGED = (
    select(_MERGES.assignment_id, _MERGES.piece)
    .join(tables.assignments, _ASSIGNMENTS.assignment_id == _MERGES.assignment_id)
    .where(_OF_RUN, _ASSIGNMENTS.state == _ADMITTED)
)


class _Base(BaseModel):
    number: int


class _Slice(BaseModel):
    """The part of a slice's manifest that says what it trains, and from what."""

    layers: tuple[LayerRole, ...]
    revision: _Base

    @property
    def pieces(self) -> tuple[str, ...]:
        return trained_pieces(tuple(it.layer_id for it in self.layers if it.role == "train"))


class _Delta(BaseModel):
    """The part of a delta's manifest that merging needs."""

    num_examples: int
    sha256: str


@dataclass(frozen=True, slots=True)
class MergeSummary:
    """What a revision merged of one piece: how many deltas, and how stale they were."""

    revision: int
    piece: str
    deltas: int
    total_staleness: int
    max_staleness: int


class ProgressRecords(Database):
    """Every method is one transaction; none of them writes."""

    def progress(self, run: str, seen_since: float, round_number: int | None = None) -> Progress:
        """Count the work of a run, or of one of its rounds; who was seen since then is there.

        What a client holds that said goodbye is waited for by nobody, and not counted.
        """
        query = _COUNTS if round_number is None else _COUNTS_OF_ROUND
        wanted = {"wanted_run": run, "seen_since": seen_since, "wanted_round": round_number}
        with self.reading() as connection:
            found = connection.execute(query, wanted)
            counts = {state: (total, at) for state, total, at in found}
        pending, at_work = counts.get(_PENDING, (0, 0))
        return Progress(counts.get(_ADMITTED, (0, 0))[0], at_work, pending - at_work)

    def waiting_deltas(self, run: str) -> list[WaitingDelta]:
        """Give the admitted deltas of a run with those of their pieces that may be merged yet."""
        with self.reading() as connection:
            return find_waiting_deltas(connection, run)

    def merges(self, run: str, revision: int) -> list[MergeRecord]:
        """Give what a revision merged, in the order of merging."""
        query = (
            select(tables.merges)
            .where(_MERGES.run == run, _MERGES.revision == revision)
            .order_by(_MERGES.assignment_id, _MERGES.piece)
        )
        with self.reading() as connection:
            return [merge_record(row) for row in connection.execute(query)]

    def pending_slices(self, run: str, seen_since: float | None = None) -> list[HeldSlice]:
        """Give the slices of a run that clients are at work on, or only of those who are there."""
        with self.reading() as connection:
            return [_held(row) for row in _rows(connection, run, _PENDING, seen_since)]

    def contributors(self, run: str, round_number: int) -> set[ClientId]:
        """Name those whose delta of a round is admitted."""
        in_round = (_ASSIGNMENTS.run == run) & (_ASSIGNMENTS.round_number == round_number)
        return self._clients(in_round & (_ASSIGNMENTS.state == _ADMITTED))

    def busy_clients(self) -> set[ClientId]:
        """Name those who have work of any run."""
        runs = select(tables.runs.c.run).scalar_subquery()
        return self._clients(_ASSIGNMENTS.run.in_(runs) & (_ASSIGNMENTS.state == _PENDING))

    def has_idle_client(self, run: str, seen_since: float) -> bool:
        """Tell whether anybody is there who may work on a run and has no work."""
        work = select(_ASSIGNMENTS.assignment_id).where(
            _ASSIGNMENTS.client_id == _CLIENTS.client_id, _ASSIGNMENTS.state == _PENDING
        )
        is_free = _is_there(seen_since) & ~work.exists()
        query = select(_CLIENTS.client_id).where(
            is_free, _CLIENTS.run.is_(None) | (_CLIENTS.run == run)
        )
        with self.reading() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def silent(self, run: str, round_number: int, seen_since: float) -> list[AssignmentId]:
        """Name a round's assignments whose clients went offline or fell silent, longest first."""
        query = (
            select(_ASSIGNMENTS.assignment_id)
            .join(tables.clients)
            .where(
                _ASSIGNMENTS.run == run,
                _ASSIGNMENTS.round_number == round_number,
                _ASSIGNMENTS.state == _PENDING,
                ~_is_there(seen_since),
            )
            .order_by(_CLIENTS.last_seen_at, _ASSIGNMENTS.assignment_id)
        )
        with self.reading() as connection:
            return [AssignmentId(found) for found in connection.scalars(query)]

    def setbacks(self, run: str, client_id: ClientId | None = None) -> dict[ClientId, Setback]:
        """Tell who failed in a run since it last delivered a delta, or only whether one did."""
        with self.reading() as connection:
            return find_setbacks(connection, run, client_id)

    def _clients(self, which: ColumnElement[bool]) -> set[ClientId]:
        with self.reading() as connection:
            found = connection.scalars(select(_ASSIGNMENTS.client_id).where(which).distinct())
            return {ClientId(client_id) for client_id in found}


def find_waiting_deltas(connection: Connection, run: str) -> list[WaitingDelta]:
    """Read inside a transaction what is admitted and not merged."""
    over: dict[str, set[str]] = defaultdict(set)
    for assignment_id, piece in connection.execute(_PARTLY_MERGED, {"wanted_run": run}):
        over[assignment_id].add(piece)
    for (assignment_id, piece), screening in find_screenings_of_admitted(connection, run).items():
        if not screening.may_merge:
            over[assignment_id].add(piece)
    found = _rows(connection, run, _ADMITTED)
    return [_waiting(row, over[row.assignment_id]) for row in found]


def summarize_merges(connection: Connection, run: str) -> list[MergeSummary]:
    """Read inside a transaction what each revision of a run merged of each piece."""
    query = (
        select(
            _MERGES.revision,
            _MERGES.piece,
            func.count(),
            func.sum(_MERGES.staleness),
            func.max(_MERGES.staleness),
        )
        .where(_MERGES.run == run)
        .group_by(_MERGES.revision, _MERGES.piece)
        .order_by(_MERGES.revision, _MERGES.piece)
    )
    return [MergeSummary(*row) for row in connection.execute(query)]


def find_merged(connection: Connection, run: str) -> dict[AssignmentId, int]:
    """Read inside a transaction into which revision the head of each delta was merged."""
    query = select(_MERGES.assignment_id, _MERGES.revision).where(
        _MERGES.run == run, _MERGES.piece == HEAD
    )
    return {AssignmentId(found): revision for found, revision in connection.execute(query)}


def find_setbacks(
    connection: Connection, run: str, client_id: ClientId | None = None
) -> dict[ClientId, Setback]:
    """Read inside a transaction who failed since it last delivered, or whether one client did."""
    wanted = {"wanted_run": run, "wanted_client": client_id}
    newest = connection.execute(_SETBACKS if client_id is None else _SETBACKS_OF_CLIENT, wanted)
    found = (Setback(ClientId(row[0]), *row[1:4]) for row in newest)
    return {setback.client_id: setback for setback in found}


def _rows(
    connection: Connection, run: str, state: str, seen_since: float | None = None
) -> Iterator[AnyRow]:
    query = (
        select(
            _ASSIGNMENTS.assignment_id,
            _ASSIGNMENTS.client_id,
            _ASSIGNMENTS.manifest,
            _ASSIGNMENTS.delta,
            _ASSIGNMENTS.chance,
            _ASSIGNMENTS.settled_at,
        )
        .where(_ASSIGNMENTS.run == run, _ASSIGNMENTS.state == state)
        .order_by(_ASSIGNMENTS.assignment_id)
        .execution_options(yield_per=_ROWS_AT_ONCE)
    )
    if seen_since is not None:
        query = query.join(tables.clients).where(_is_there(seen_since))
    return iter(connection.execute(query))


def _held(row: AnyRow) -> HeldSlice:
    part = _Slice.model_validate_json(row.manifest)
    return HeldSlice(AssignmentId(row.assignment_id), part.revision.number, part.pieces)


def _waiting(row: AnyRow, over: set[str]) -> WaitingDelta:
    part = _Slice.model_validate_json(row.manifest)
    delta = _Delta.model_validate_json(row.delta)
    return WaitingDelta(
        assignment_id=AssignmentId(row.assignment_id),
        base_revision=part.revision.number,
        pieces=tuple(piece for piece in part.pieces if piece not in over),
        num_examples=delta.num_examples,
        chance=row.chance,
        sha256=delta.sha256,
        admitted_at=row.settled_at,
        client_id=ClientId(row.client_id),
    )
