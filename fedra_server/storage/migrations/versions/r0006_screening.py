"""What screening found out about each delta; runs that began before are not screened."""

from __future__ import annotations

import json
from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0006"
down_revision: Final = "0005"
_NOT_SCREENED: Final = {"enabled": False}


def upgrade() -> None:
    """Add table and column, and keep the rules by which older runs were merged."""
    op.add_column("merges", sa.Column("scale", sa.Float, nullable=False, server_default="1"))
    op.create_table(
        "screenings",
        sa.Column(
            "assignment_id",
            sa.String(64),
            sa.ForeignKey("assignments.assignment_id"),
            primary_key=True,
        ),
        sa.Column("piece", sa.String(16), primary_key=True),
        sa.Column("run", sa.String(64), sa.ForeignKey("runs.run"), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("judgement", sa.Integer, nullable=False),
        sa.Column("norm", sa.Float),
        sa.Column("cosine", sa.Float),
        sa.Column("scale", sa.Float, nullable=False),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("outcome", sa.String(16)),
        sa.Column("judged_at", sa.Float, nullable=False),
    )
    op.create_index("screenings_by_judgement", "screenings", ["run", "judgement"])
    op.create_index("screenings_by_verdict", "screenings", ["run", "verdict"])
    connection = op.get_bind()
    change = sa.text("UPDATE runs SET spec = :spec WHERE run = :run")
    for run, spec in connection.execute(sa.text("SELECT run, spec FROM runs")).all():
        text = json.dumps({**json.loads(spec), "screening": _NOT_SCREENED})
        connection.execute(change, {"run": run, "spec": text})


def downgrade() -> None:
    """Drop what was added, and what older versions do not know of a run."""
    op.drop_table("screenings")
    op.drop_column("merges", "scale")
    connection = op.get_bind()
    change = sa.text("UPDATE runs SET spec = :spec WHERE run = :run")
    for run, text in connection.execute(sa.text("SELECT run, spec FROM runs")).all():
        spec = json.loads(text)
        for name in ("screening", "merge", "trim_fraction", "tolerated_attackers"):
            spec.pop(name, None)
        connection.execute(change, {"run": run, "spec": json.dumps(spec)})
