"""The first schema: clients, models, runs and all that a round leaves behind."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0001"
down_revision: Final = None


def upgrade() -> None:
    """Create all tables."""
    _create_population()
    _create_models_and_runs()
    _create_rounds()
    _create_work()


def downgrade() -> None:
    """Drop all tables, those that refer to others first."""
    for table in ("evaluations", "uploads", "assignments", "rounds", "revisions", "runs"):
        op.drop_table(table)
    for table in ("models", "calibrations", "clients"):
        op.drop_table(table)


def _create_population() -> None:
    op.create_table(
        "clients",
        sa.Column("client_id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("credential_sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("run", sa.String(64)),
        sa.Column("profile", sa.Text, nullable=False),
        sa.Column("enrolled_at", sa.Float, nullable=False),
        sa.Column("last_seen_at", sa.Float, nullable=False),
        sa.Column("is_online", sa.Boolean, nullable=False),
        sa.Column("has_left", sa.Boolean, nullable=False),
    )
    op.create_table(
        "calibrations",
        sa.Column("client_id", sa.String(64), sa.ForeignKey("clients.client_id"), primary_key=True),
        sa.Column("model_id", sa.String(64), primary_key=True),
        sa.Column("calibration", sa.Text, nullable=False),
    )


def _create_models_and_runs() -> None:
    op.create_table(
        "models",
        sa.Column("model_id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(200), nullable=False, unique=True),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("added_at", sa.Float, nullable=False),
    )
    op.create_table(
        "runs",
        sa.Column("run", sa.String(64), primary_key=True),
        sa.Column("model_id", sa.String(64), sa.ForeignKey("models.model_id"), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )


def _create_rounds() -> None:
    op.create_table(
        "revisions",
        sa.Column("run", sa.String(64), sa.ForeignKey("runs.run"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("last_trained", sa.Text, nullable=False),
        sa.Column("published_at", sa.Float, nullable=False),
    )
    op.create_table(
        "rounds",
        sa.Column("run", sa.String(64), sa.ForeignKey("runs.run"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("base_revision", sa.Integer, nullable=False),
        sa.Column("draws", sa.Integer, nullable=False),
        sa.Column("opened_at", sa.Float, nullable=False),
        sa.Column("deadline_at", sa.Float, nullable=False),
        sa.Column("published_at", sa.Float),
    )


def _create_work() -> None:
    op.create_table(
        "assignments",
        sa.Column("assignment_id", sa.String(64), primary_key=True),
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("round_number", sa.Integer, nullable=False),
        sa.Column("client_id", sa.String(64), sa.ForeignKey("clients.client_id"), nullable=False),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("chance", sa.Float, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("delta", sa.Text),
        sa.Column("issued_at", sa.Float, nullable=False),
        sa.Column("settled_at", sa.Float),
        sa.ForeignKeyConstraint(["run", "round_number"], ["rounds.run", "rounds.number"]),
    )
    op.create_index("assignments_by_round", "assignments", ["run", "round_number"])
    op.create_index("assignments_by_client", "assignments", ["client_id", "state"])
    op.create_table(
        "uploads",
        sa.Column("upload_id", sa.String(64), primary_key=True),
        sa.Column(
            "assignment_id",
            sa.String(64),
            sa.ForeignKey("assignments.assignment_id"),
            nullable=False,
        ),
        sa.Column("client_id", sa.String(64), sa.ForeignKey("clients.client_id"), nullable=False),
        sa.Column("delta", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_index("uploads_by_assignment", "uploads", ["assignment_id"])
    op.create_table(
        "evaluations",
        sa.Column("run", sa.String(64), sa.ForeignKey("runs.run"), primary_key=True),
        sa.Column("revision", sa.Integer, primary_key=True),
        sa.Column("client_id", sa.String(64), sa.ForeignKey("clients.client_id"), primary_key=True),
        sa.Column("evaluation", sa.Text, nullable=False),
    )
