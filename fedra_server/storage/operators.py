"""The records of operators; their secrets are known by digest only."""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

from pydantic import JsonValue
from sqlalchemy import bindparam, delete, insert, select

from fedra_server.chain import COMMAND, Event
from fedra_server.errors import ConflictError, NotFoundError
from fedra_server.hiding import without_secrets
from fedra_server.roles import OperatorRecord, Role
from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.journal import write_entry
from fedra_server.storage.rows import AnyRow

_OPERATORS: Final = tables.operators.c
_BY_SECRET: Final = select(tables.operators).where(_OPERATORS.secret_sha256 == bindparam("digest"))


def new_operator_secret() -> str:
    """Draw what an operator's requests carry; the store keeps its digest only."""
    return f"op-{secrets.token_hex(32)}"


def operator_secret_sha256(secret: str) -> str:
    """Digest a secret that is too long to be guessed."""
    return hashlib.sha256(secret.encode()).hexdigest()


class OperatorRecords(Database):
    """Every method is one transaction."""

    def add_operator(self, record: OperatorRecord, secret: str, by: str = COMMAND) -> None:
        """Let an operator in.

        Raises:
            ConflictError: There is one of this name.
        """
        values = {
            "name": record.name,
            "role": record.role.value,
            "secret_sha256": operator_secret_sha256(secret),
            "added_at": record.added_at,
            "expires_at": record.expires_at,
        }
        details: dict[str, JsonValue] = {
            "role": record.role.value, "expires_at": record.expires_at,
        }  # fmt: skip
        name = select(_OPERATORS.name).where(_OPERATORS.name == record.name)
        with self.writing() as connection:
            if connection.execute(name).one_or_none() is not None:
                raise ConflictError(
                    f"there is an operator named {record.name!r} already",
                    remedy="Remove it first, or choose another name.",
                )
            connection.execute(insert(tables.operators).values(values))
            write_entry(connection, Event.OPERATOR_ADDED, record.name, by, details)

    def operator_by_secret(self, secret: str, now: float) -> OperatorRecord | None:
        """Find whose secret this is; nobody's once it has expired."""
        with self.reading() as connection:
            wanted = {"digest": operator_secret_sha256(secret)}
            row = connection.execute(_BY_SECRET, wanted).one_or_none()
        found = None if row is None else _operator_record(row)
        return found if found is not None and found.is_valid(now) else None

    def operators(self) -> list[OperatorRecord]:
        """Give all operators, in the order in which they were added."""
        query = select(tables.operators).order_by(_OPERATORS.added_at, _OPERATORS.name)
        with self.reading() as connection:
            return [_operator_record(row) for row in connection.execute(query).all()]

    def remove_operator(self, name: str, by: str = COMMAND) -> None:
        """Shut an operator out at once.

        Raises:
            NotFoundError: There is none of this name.
        """
        with self.writing() as connection:
            change = delete(tables.operators).where(_OPERATORS.name == name)
            if connection.execute(change).rowcount == 0:
                raise NotFoundError(
                    f"there is no operator named {without_secrets(name)!r}",
                    remedy="See `fedra-server operator list`.",
                )
            write_entry(connection, Event.OPERATOR_REMOVED, name, by)


def _operator_record(row: AnyRow) -> OperatorRecord:
    return OperatorRecord(row.name, Role(row.role), row.added_at, row.expires_at)
