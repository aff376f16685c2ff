"""Operators, and the hash-chained journal that nobody can change."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Final

import sqlalchemy as sa
from alembic import op
from pydantic import JsonValue

from fedra_server.chain import BEFORE_ALL, COMMAND, Event, entry_after

revision: Final = "0005"
down_revision: Final = "0004"

_COUNTED: Final = ("clients", "models", "runs", "revisions")
_CHANGES: Final = ("UPDATE", "DELETE")


def upgrade() -> None:
    """Add the tables, refuse changes of the journal, and write its first entry."""
    op.create_table(
        "operators",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("secret_sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("added_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
    )
    journal = op.create_table(
        "journal",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("event", sa.String(32), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("by", sa.String(100), nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sa.Column("previous_sha256", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
    )
    connection = op.get_bind()
    before: dict[str, JsonValue] = {
        name: connection.scalar(sa.select(sa.func.count()).select_from(sa.table(name)))
        for name in _COUNTED
    }
    first = entry_after(
        BEFORE_ALL, time.time(), Event.JOURNAL_BEGUN, subject="journal", by=COMMAND,
        details={"upgraded": any(before.values()), "before": before},
    )  # fmt: skip
    op.bulk_insert(journal, [asdict(first)])
    if connection.dialect.name == "postgresql":
        _refuse_changes_on_postgresql()
    else:
        _refuse_changes_on_sqlite()


def downgrade() -> None:
    """Drop the tables."""
    op.drop_table("journal")
    op.drop_table("operators")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION refuse_journal_change()")


def _refuse_changes_on_sqlite() -> None:
    for change in _CHANGES:
        op.execute(
            f"CREATE TRIGGER journal_refuses_{change.lower()} BEFORE {change} ON journal "
            "BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END"
        )
    op.execute(  # INSERT OR REPLACE would delete a row without asking the triggers above
        "CREATE TRIGGER journal_refuses_insertion BEFORE INSERT ON journal "
        "WHEN EXISTS (SELECT 1 FROM journal WHERE sequence >= NEW.sequence) "
        "BEGIN SELECT RAISE(ABORT, 'the journal is append-only'); END"
    )


def _refuse_changes_on_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION refuse_journal_change() RETURNS trigger LANGUAGE plpgsql "
        "AS $$ BEGIN RAISE EXCEPTION 'the journal is append-only'; END $$"
    )
    op.execute(
        "CREATE TRIGGER journal_refuses_changes BEFORE UPDATE OR DELETE OR TRUNCATE ON journal "
        "FOR EACH STATEMENT EXECUTE FUNCTION refuse_journal_change()"
    )
