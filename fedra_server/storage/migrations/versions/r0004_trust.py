"""Keys of clients and join tokens; what stood for a credential is no key, and opens nothing."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from alembic import op

revision: Final = "0004"
down_revision: Final = "0003"

_FORGET_CREDENTIALS: Final = (
    "UPDATE clients SET public_key = 'none:' || client_id WHERE length(public_key) = 64"
)
"""Digests of credentials have 64 characters, keys 43."""


def upgrade() -> None:
    """Let keys take the place of credentials, and add the tokens.

    Clients of before keep their row and have no key until they enrol again with a token.
    """
    op.execute("ALTER TABLE clients RENAME COLUMN credential_sha256 TO public_key")
    op.execute(_FORGET_CREDENTIALS)
    op.create_table(
        "join_tokens",
        sa.Column("token_id", sa.String(64), primary_key=True),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("label", sa.String(64), nullable=False),
        sa.Column("client_id", sa.String(64), sa.ForeignKey("clients.client_id")),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("uses_allowed", sa.Integer, nullable=False),
        sa.Column("uses_left", sa.Integer, nullable=False),
        sa.Column("revoked_at", sa.Float),
    )


def downgrade() -> None:
    """Drop the tokens; credentials do not come back, keys stay for the next step up."""
    op.drop_table("join_tokens")
    op.execute("ALTER TABLE clients RENAME COLUMN public_key TO credential_sha256")
