"""What screening found out about each delta."""

from __future__ import annotations

from typing import Final

revision: Final = "0006"
down_revision: Final = "0005"


def upgrade() -> None:
    """Add the tables."""


def downgrade() -> None:
    """Drop the tables."""
