"""Tells errors for want of memory, which a smaller plan may avoid, from all others."""

from __future__ import annotations

from typing import Final

_SIGNS: Final = (
    "allocate memory", "out of memory", "bad_alloc", "not enough memory",
    "could not create a primitive", "could not execute a primitive",
)  # fmt: skip
"""What frameworks and the system say, in errors of no type of their own, of memory."""


def is_memory_shortage(error: Exception) -> bool:
    """Tell an error that a smaller plan may avoid from all others."""
    told = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in told for sign in _SIGNS)
