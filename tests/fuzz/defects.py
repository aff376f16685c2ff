"""Targets with a defect each, to see that fuzzing finds every kind."""

from __future__ import annotations

from typing import Final

from tests.fuzz.targets import Target


def raise_undocumented(data: bytes) -> None:
    """Fail as a reader does that forgot to look."""
    if data.startswith(b"!"):
        _ = data[len(data)]


def allocate_as_told(data: bytes) -> None:
    """Believe a size in the input."""
    bytes(2**32 if data.startswith(b"!") else 1)


def never_end(data: bytes) -> None:
    """Wait for something that does not come."""
    while data.startswith(b"!"):
        pass


DEFECTS: Final = {
    "defect-error": Target(raise_undocumented, ("!",)),
    "defect-memory": Target(allocate_as_told, ("!",)),
    "defect-hang": Target(never_end, ("!",)),
}
