"""The database schema, as SQLAlchemy tables; migrations/ brings a file up to it."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

METADATA: Final = MetaData()

clients = Table(
    "clients",
    METADATA,
    Column("client_id", String(64), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("public_key", String(64), nullable=False, unique=True),
    Column("run", String(64)),
    Column("profile", Text, nullable=False),
    Column("enrolled_at", Float, nullable=False),
    Column("last_seen_at", Float, nullable=False),
    Column("is_online", Boolean, nullable=False),
    Column("has_left", Boolean, nullable=False),
)

join_tokens = Table(
    "join_tokens",
    METADATA,
    Column("token_id", String(64), primary_key=True),
    Column("secret_sha256", String(64), nullable=False),
    Column("label", String(64), nullable=False),
    Column("client_id", ForeignKey("clients.client_id")),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("uses_allowed", Integer, nullable=False),
    Column("uses_left", Integer, nullable=False),
    Column("revoked_at", Float),
)

calibrations = Table(
    "calibrations",
    METADATA,
    Column("client_id", ForeignKey("clients.client_id"), primary_key=True),
    Column("model_id", String(64), primary_key=True),
    Column("calibration", Text, nullable=False),
)

models = Table(
    "models",
    METADATA,
    Column("model_id", String(64), primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("spec", Text, nullable=False),
    Column("added_at", Float, nullable=False),
)

runs = Table(
    "runs",
    METADATA,
    Column("run", String(64), primary_key=True),
    Column("model_id", ForeignKey("models.model_id"), nullable=False),
    Column("spec", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("pruned_through", Integer, nullable=False, server_default="0"),
)

revisions = Table(
    "revisions",
    METADATA,
    Column("run", ForeignKey("runs.run"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("manifest", Text, nullable=False),
    Column("last_trained", Text, nullable=False),
    Column("published_at", Float, nullable=False),
    Column("versions", Text, nullable=False, server_default="[]"),
    Column("moments", Text, nullable=False, server_default="[]"),
)

rounds = Table(
    "rounds",
    METADATA,
    Column("run", ForeignKey("runs.run"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("base_revision", Integer, nullable=False),
    Column("draws", Integer, nullable=False),
    Column("opened_at", Float, nullable=False),
    Column("deadline_at", Float, nullable=False),
    Column("published_at", Float),
)

assignments = Table(
    "assignments",
    METADATA,
    Column("assignment_id", String(64), primary_key=True),
    Column("run", String(64), nullable=False),
    Column("round_number", Integer, nullable=False),
    Column("client_id", ForeignKey("clients.client_id"), nullable=False),
    Column("manifest", Text, nullable=False),
    Column("chance", Float, nullable=False),
    Column("reason", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("detail", Text, nullable=False),
    Column("delta", Text),
    Column("issued_at", Float, nullable=False),
    Column("settled_at", Float),
    ForeignKeyConstraint(["run", "round_number"], ["rounds.run", "rounds.number"]),
    Index("assignments_by_round", "run", "round_number"),
    Index("assignments_by_client", "client_id", "state"),
    Index("assignments_by_state", "run", "state"),
)

merges = Table(
    "merges",
    METADATA,
    Column("assignment_id", ForeignKey("assignments.assignment_id"), primary_key=True),
    Column("piece", String(16), primary_key=True),
    Column("run", String(64), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("weight", Float, nullable=False),
    Column("staleness", Integer, nullable=False),
    Column("scale", Float, nullable=False, server_default="1"),
    ForeignKeyConstraint(["run", "revision"], ["revisions.run", "revisions.number"]),
    Index("merges_by_revision", "run", "revision"),
)

screenings = Table(
    "screenings",
    METADATA,
    Column("assignment_id", ForeignKey("assignments.assignment_id"), primary_key=True),
    Column("piece", String(16), primary_key=True),
    Column("run", ForeignKey("runs.run"), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("judgement", Integer, nullable=False),
    Column("norm", Float),
    Column("cosine", Float),
    Column("scale", Float, nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("outcome", String(16)),
    Column("judged_at", Float, nullable=False),
    Index("screenings_by_judgement", "run", "judgement"),
    Index("screenings_by_verdict", "run", "verdict"),
)

uploads = Table(
    "uploads",
    METADATA,
    Column("upload_id", String(64), primary_key=True),
    Column("assignment_id", ForeignKey("assignments.assignment_id"), nullable=False),
    Column("client_id", ForeignKey("clients.client_id"), nullable=False),
    Column("delta", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Index("uploads_by_assignment", "assignment_id"),
)

evaluations = Table(
    "evaluations",
    METADATA,
    Column("run", ForeignKey("runs.run"), primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("client_id", ForeignKey("clients.client_id"), primary_key=True),
    Column("evaluation", Text, nullable=False),
)

journal = Table(
    "journal",
    METADATA,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("event", String(32), nullable=False),
    Column("subject", String(200), nullable=False),
    Column("by", String(100), nullable=False),
    Column("details", Text, nullable=False),
    Column("previous_sha256", String(64), nullable=False),
    Column("sha256", String(64), nullable=False),
)

operators = Table(
    "operators",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("secret_sha256", String(64), nullable=False, unique=True),
    Column("added_at", Float, nullable=False),
    Column("expires_at", Float),
)
