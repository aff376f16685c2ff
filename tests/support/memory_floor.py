"""As little memory as any work is done in."""

from __future__ import annotations

from typing import Final

from fedra_edge.memory_meter import unshared_bytes

_TO_SPARE_BYTES: Final = 16 * 2**20
"""For what this process takes meanwhile; less than its shared libraries, which count as well."""


def scarce() -> int:
    """Give so little usable memory that one example goes at a time."""
    return unshared_bytes() + _TO_SPARE_BYTES
