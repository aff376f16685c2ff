"""The hash-chained record of what happened."""

from __future__ import annotations

from typing import Final

revision: Final = "0005"
down_revision: Final = "0004"


def upgrade() -> None:
    """Add the tables."""


def downgrade() -> None:
    """Drop the tables."""
