"""The records of registered models."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, insert, select

from fedra_edge.protocol.models import ModelSpec
from fedra_server.chain import COMMAND, Event
from fedra_server.errors import ConflictError, NotFoundError
from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.journal import write_entry
from fedra_server.storage.records import ModelRecord
from fedra_server.storage.rows import model_record

_MODELS = tables.models.c


class ModelRecords(Database):
    """Every method is one transaction."""

    def add_model(self, spec: ModelSpec, now: float) -> ModelRecord:
        """Register a model; the same model again changes nothing.

        Raises:
            ConflictError: Another model has this name.
        """
        with self.writing() as connection:
            known = _find(connection, _MODELS.name == spec.name)
            if known is None:
                values = {
                    "model_id": spec.model_id,
                    "name": spec.name,
                    "spec": spec.model_dump_json(),
                    "added_at": now,
                }
                connection.execute(insert(tables.models).values(values))
                details = {"model_id": spec.model_id}
                write_entry(connection, Event.MODEL_REGISTERED, spec.name, COMMAND, details)
                return ModelRecord(spec.model_id, spec, now)
            if known.model_id != spec.model_id:
                raise ConflictError(
                    f"a model named {spec.name!r} is registered already, and this one differs",
                    remedy="Choose another name.",
                )
            return known

    def model(self, model_id: str) -> ModelRecord:
        """Give a model by its digest.

        Raises:
            NotFoundError: No such model.
        """

        def read(connection: Connection) -> ModelRecord:
            found = _find(connection, _MODELS.model_id == model_id)
            if found is None:
                raise NotFoundError(f"there is no model {model_id[:64]}")
            return found

        return self.read_lasting(("model", model_id), read)

    def model_by_name(self, name: str) -> ModelRecord:
        """Give a model by its name.

        Raises:
            NotFoundError: No such model.
        """
        with self.reading() as connection:
            found = _find(connection, _MODELS.name == name)
        if found is None:
            raise NotFoundError(
                f"there is no model named {name!r}",
                remedy="See `fedra-server model list`, or add it with `fedra-server model add`.",
            )
        return found

    def models(self) -> list[ModelRecord]:
        """Give all models, in the order they were added."""
        query = select(tables.models).order_by(_MODELS.added_at, _MODELS.name)
        with self.reading() as connection:
            return [model_record(row) for row in connection.execute(query).all()]


def _find(connection: Connection, condition: ColumnElement[bool]) -> ModelRecord | None:
    row = connection.execute(select(tables.models).where(condition)).one_or_none()
    return None if row is None else model_record(row)
