"""Alembic's entry: runs the steps on the connection that migrating.py hands over."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from fedra_edge.protocol.fault_points import fault_point
from fedra_server.storage.tables import METADATA


def run_migrations() -> None:
    """Run the wanted steps inside the caller's transaction."""
    connection = context.config.attributes["connection"]
    if not isinstance(connection, Connection):
        raise TypeError("migrations run through fedra_server.storage.migrating only")
    context.configure(
        connection=connection,
        target_metadata=METADATA,
        transactional_ddl=True,
        on_version_apply=lambda **_step: fault_point("migrate.step"),
    )
    context.run_migrations()


run_migrations()
