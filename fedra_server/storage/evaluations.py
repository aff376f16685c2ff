"""The records of what clients measured of revisions."""

from __future__ import annotations

from sqlalchemy import Connection, insert, select, update

from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.rounds import Evaluation
from fedra_server.errors import NotFoundError
from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.records import EvaluationRecord
from fedra_server.storage.rows import evaluation_record

_EVALUATIONS = tables.evaluations.c


class EvaluationRecords(Database):
    """Every method is one transaction."""

    def add_evaluation(self, client_id: ClientId, evaluation: Evaluation) -> None:
        """Keep one client's counts on one revision, in place of earlier ones.

        Raises:
            NotFoundError: No such revision.
            ConflictError: No such client.
        """
        revision = select(tables.revisions.c.number).where(
            tables.revisions.c.run == evaluation.run,
            tables.revisions.c.number == evaluation.revision,
        )
        keys = {"run": evaluation.run, "revision": evaluation.revision, "client_id": client_id}
        values = {"evaluation": evaluation.model_dump_json()}
        change = update(tables.evaluations).where(
            _EVALUATIONS.run == evaluation.run,
            _EVALUATIONS.revision == evaluation.revision,
            _EVALUATIONS.client_id == client_id,
        )
        with self.writing() as connection:
            if connection.execute(revision).one_or_none() is None:
                name = f"revision {evaluation.revision} of run {evaluation.run!r}"
                raise NotFoundError(f"there is no {name}")
            if connection.execute(change.values(values)).rowcount == 0:
                connection.execute(insert(tables.evaluations).values({**keys, **values}))

    def evaluations(self, run: str) -> list[EvaluationRecord]:
        """Give all counts of a run, by revision."""
        with self.reading() as connection:
            return find_evaluations(connection, run)

    def has_evaluation(self, client_id: ClientId, run: str, revision: int) -> bool:
        """Tell whether a client has evaluated a revision."""
        query = select(_EVALUATIONS.revision).where(
            _EVALUATIONS.client_id == client_id,
            _EVALUATIONS.run == run,
            _EVALUATIONS.revision == revision,
        )
        with self.reading() as connection:
            return connection.execute(query).one_or_none() is not None


def find_evaluations(connection: Connection, run: str) -> list[EvaluationRecord]:
    """Read a run's evaluations inside a transaction, by revision."""
    query = select(tables.evaluations).where(_EVALUATIONS.run == run)
    query = query.order_by(_EVALUATIONS.revision, _EVALUATIONS.client_id)
    return [evaluation_record(row) for row in connection.execute(query).all()]
