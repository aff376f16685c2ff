"""An index by state: what a run still waits for is found without reading all its assignments."""

from __future__ import annotations

from typing import Final

from alembic import op

revision: Final = "0003"
down_revision: Final = "0002"


def upgrade() -> None:
    """Add the index."""
    op.create_index("assignments_by_state", "assignments", ["run", "state"])


def downgrade() -> None:
    """Drop the index."""
    op.drop_index("assignments_by_state", table_name="assignments")
