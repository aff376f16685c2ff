"""Everything a run left behind, read as of one moment."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlalchemy import select

from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_server.choosing import Population, resting
from fedra_server.rounds import Setback, WaitingDelta
from fedra_server.runs import AssignmentState
from fedra_server.storage import tables
from fedra_server.storage.clients import find_calibrations
from fedra_server.storage.database import Database
from fedra_server.storage.evaluations import find_evaluations
from fedra_server.storage.progress import (
    MergeSummary,
    find_merged,
    find_setbacks,
    find_waiting_deltas,
    summarize_merges,
)
from fedra_server.storage.records import (
    AssignmentRecord,
    ClientRecord,
    EvaluationRecord,
    ModelRecord,
    RevisionRecord,
    RoundRecord,
    RunRecord,
)
from fedra_server.storage.rounds import find_assignments, find_rounds
from fedra_server.storage.rows import client_record, model_record
from fedra_server.storage.runs import find_revisions, find_run


@dataclass(frozen=True)
class RunHistory:
    """A run with all its records; ``clients`` holds the whole population, left members too.

    ``calibrations`` are the members' of the run's model; ``busy_elsewhere`` names who has work
    of another run. ``merges`` sums up what each revision merged of each piece, ``merged_in`` says
    which one took the head of a delta, ``waiting`` has the deltas that still wait, and
    ``setbacks`` who failed since it last delivered.
    """

    run: RunRecord
    model: ModelRecord
    revisions: list[RevisionRecord]
    rounds: list[RoundRecord]
    assignments: list[AssignmentRecord]
    evaluations: list[EvaluationRecord]
    clients: list[ClientRecord]
    calibrations: dict[ClientId, Calibration]
    busy_elsewhere: frozenset[ClientId]
    merges: list[MergeSummary] = field(default_factory=list)
    merged_in: dict[AssignmentId, int] = field(default_factory=dict)
    waiting: list[WaitingDelta] = field(default_factory=list)
    setbacks: dict[ClientId, Setback] = field(default_factory=dict)

    def population(self, seen_since: float, now: float) -> Population:
        """Give the members at that moment; work of this very run keeps nobody busy."""
        members = [client for client in self.clients if not client.has_left]
        return Population(
            members,
            self.calibrations,
            self.busy_elsewhere,
            seen_since,
            resting(self.setbacks, now),
        )


class RunHistories(Database):
    """Every method is one transaction."""

    def run_history(self, run: str) -> RunHistory:
        """Give all that a run left behind, consistent even while the run goes on.

        Raises:
            NotFoundError: No such run.
        """
        with self.reading() as connection:
            record = find_run(connection, run)
            model = select(tables.models).where(tables.models.c.model_id == record.model_id)
            clients = select(tables.clients).order_by(tables.clients.c.enrolled_at)
            busy = select(tables.assignments.c.client_id).where(
                tables.assignments.c.run != run,
                tables.assignments.c.state == AssignmentState.PENDING.value,
            )
            return RunHistory(
                run=record,
                model=model_record(connection.execute(model).one()),
                revisions=find_revisions(connection, run),
                rounds=find_rounds(connection, run),
                assignments=find_assignments(connection, run),
                evaluations=find_evaluations(connection, run),
                clients=[client_record(row) for row in connection.execute(clients).all()],
                calibrations=find_calibrations(connection, record.model_id),
                busy_elsewhere=frozenset(map(ClientId, connection.execute(busy).scalars())),
                merges=summarize_merges(connection, run),
                merged_in=find_merged(connection, run),
                waiting=find_waiting_deltas(connection, run),
                setbacks=find_setbacks(connection, run),
            )
