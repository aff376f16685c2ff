"""Bringing a database to the current schema, once, however many processes open it together."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy import Connection, inspect, text

from fedra_server.errors import ConfigurationError
from fedra_server.storage.database import Database

CURRENT_SCHEMA: Final = "0006"
"""The newest step in migrations/versions; a test holds the two together."""

_VERSION_TABLE: Final = "alembic_version"
_POSTGRES_LOCK: Final = 0x66656472  # any constant that every server shares
_MIGRATIONS: Final = Path(__file__).parent / "migrations"


def migrate(database: Database) -> None:
    """Take the steps that are missing, in one transaction; others wait for its end.

    Raises:
        ConfigurationError: The database was written by a newer version.
        StorageError: The database refused.
    """
    with database.reading() as connection:
        if _schema_of(connection) == CURRENT_SCHEMA:
            return
    with database.writing() as connection:
        _wait_for_other_migrations(connection)
        if _schema_of(connection) != CURRENT_SCHEMA:
            _take_steps(connection)


def _schema_of(connection: Connection) -> str | None:
    if not inspect(connection).has_table(_VERSION_TABLE):
        return None
    schema = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return None if schema is None else str(schema)


def _wait_for_other_migrations(connection: Connection) -> None:
    """Take a lock to the end of the transaction; SQLite's writer holds one already."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRES_LOCK})


def _take_steps(connection: Connection) -> None:
    from alembic import command  # loaded only when there is something to do
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigurationError(
            f"the database has a schema that this version does not know: {error}",
            remedy="Upgrade fedra; the database was written by a newer version.",
        ) from error
