"""What an operator may do: roles, each of which may do what a lower one may."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Role(StrEnum):
    """scrape < view < operate < administer."""

    SCRAPE = "scrape"
    VIEW = "view"
    OPERATE = "operate"
    ADMINISTER = "administer"


_RANKS: Final = {role: rank for rank, role in enumerate(Role)}


@dataclass(frozen=True)
class OperatorRecord:
    """Somebody, or a program, that steers the server over HTTP; None never expires."""

    name: str
    role: Role
    added_at: float
    expires_at: float | None

    def may(self, needed: Role) -> bool:
        """Tell whether what needs a role may be done."""
        return _RANKS[self.role] >= _RANKS[needed]

    def is_valid(self, now: float) -> bool:
        """Tell whether the credential works still."""
        return self.expires_at is None or now < self.expires_at
