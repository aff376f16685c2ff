"""Merging piece by piece: which delta went into which revision of which piece, and how heavy."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0002"
down_revision: Final = "0001"


def upgrade() -> None:
    """Add the table and columns, and fill them for what was published before."""
    op.add_column(
        "runs", sa.Column("pruned_through", sa.Integer, nullable=False, server_default="0")
    )
    for name in ("versions", "moments"):
        column = sa.Column(name, sa.Text, nullable=False, server_default="[]")
        op.add_column("revisions", column)
    merges = op.create_table(
        "merges",
        sa.Column(
            "assignment_id",
            sa.String(64),
            sa.ForeignKey("assignments.assignment_id"),
            primary_key=True,
        ),
        sa.Column("piece", sa.String(16), primary_key=True),
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("staleness", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["run", "revision"], ["revisions.run", "revisions.number"]),
    )
    op.create_index("merges_by_revision", "merges", ["run", "revision"])
    connection = op.get_bind()
    for run, spec in connection.execute(sa.text("SELECT run, spec FROM runs")).all():
        _fill_run(connection, merges, run, json.loads(spec))


def downgrade() -> None:
    """Drop what was added."""
    op.drop_table("merges")
    op.drop_column("revisions", "moments")
    op.drop_column("revisions", "versions")
    op.drop_column("runs", "pruned_through")


def _fill_run(connection: sa.Connection, merges: sa.Table, run: str, spec: dict[str, Any]) -> None:
    """Count the merges of every piece, revision by revision; a round published its number."""
    numbers = sa.text("SELECT number, manifest FROM revisions WHERE run = :run ORDER BY number")
    change = sa.text(
        "UPDATE revisions SET versions = :versions, moments = :moments"
        " WHERE run = :run AND number = :number"
    )
    counts: Counter[str] = Counter()
    for number, manifest in connection.execute(numbers, {"run": run}).all():
        rows = _merges_of(connection, run, number, spec)
        if rows:
            connection.execute(sa.insert(merges), rows)
        counts.update({str(row["piece"]) for row in rows})
        layers = len(json.loads(manifest)["layers"])
        versions = [counts[piece] for piece in (*map("layers.{}".format, range(layers)), "head")]
        values = {"versions": json.dumps(versions), "moments": json.dumps([None] * len(versions))}
        connection.execute(change, {"run": run, "number": number, **values})


def _merges_of(
    connection: sa.Connection, run: str, number: int, spec: dict[str, Any]
) -> list[dict[str, object]]:
    """Give the rows of a round's deltas, with the weights that it was merged with."""
    merged = sa.text(
        "SELECT assignment_id, manifest, chance, delta FROM assignments"
        " WHERE run = :run AND round_number = :number AND state = 'merged'"
    )
    rows: list[dict[str, object]] = []
    for found in connection.execute(merged, {"run": run, "number": number}):
        layers = json.loads(found.manifest)["layers"]
        trained = [layer["layer_id"] for layer in layers if layer["role"] == "train"]
        num_examples = float(json.loads(found.delta)["num_examples"])
        weight_of_head, weight_of_layer = {
            "uniform": (1.0, 1.0),
            "num_examples": (num_examples, num_examples),
            "inverse_chance": (1.0, min(1.0 / found.chance, float(spec["max_inverse_chance"]))),
        }[spec["merge_weighting"]]
        weights = {f"layers.{layer_id}": weight_of_layer for layer_id in trained}
        rows += [
            {
                "assignment_id": found.assignment_id, "piece": piece, "run": run,
                "revision": number, "weight": weight, "staleness": 0,
            }
            for piece, weight in {**weights, "head": weight_of_head}.items()
        ]  # fmt: skip
    return rows
