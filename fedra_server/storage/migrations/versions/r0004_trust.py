"""Keys of clients, join tokens and operators."""

from __future__ import annotations

from typing import Final

revision: Final = "0004"
down_revision: Final = "0003"


def upgrade() -> None:
    """Add the tables."""


def downgrade() -> None:
    """Drop the tables."""
