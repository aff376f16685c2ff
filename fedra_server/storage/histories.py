"""Everything a run left behind, read as of one moment."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select

from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.evaluations import find_evaluations
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
    """A run with all its records; ``clients`` holds the whole population, left members too."""

    run: RunRecord
    model: ModelRecord
    revisions: list[RevisionRecord]
    rounds: list[RoundRecord]
    assignments: list[AssignmentRecord]
    evaluations: list[EvaluationRecord]
    clients: list[ClientRecord]


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
            return RunHistory(
                run=record,
                model=model_record(connection.execute(model).one()),
                revisions=find_revisions(connection, run),
                rounds=find_rounds(connection, run),
                assignments=find_assignments(connection, run),
                evaluations=find_evaluations(connection, run),
                clients=[client_record(row) for row in connection.execute(clients).all()],
            )
