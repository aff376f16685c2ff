"""Keeps training within the memory there is at the moment, by stepping down to smaller plans."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final

from fedra_edge.errors import MORE_MEMORY, MemoryShortError
from fedra_edge.protocol.footprint import Footprint, MemoryPlan, plans

LOGGER: Final = logging.getLogger(__name__)
_MEGABYTE: Final = 10**6
_MUCH_SMALLER: Final = 0.85
"""A plan that failed for want of memory is followed by one that needs at most this part of it."""


class PromiseGuard:
    """Holds a slice to the memory that can be used now.

    ``step_downs`` tells what it had to do, ``promised_bytes`` is the highest prediction so far.

    Args:
        footprint: What the slice takes on this machine.
        usable_bytes: Measures what the whole process may occupy now.
    """

    def __init__(self, footprint: Footprint, usable_bytes: Callable[[], int]) -> None:
        self._footprint = footprint
        self._usable_bytes = usable_bytes
        self._plans = tuple(plans(footprint.training, footprint.backend))
        self.step_downs: list[str] = []
        self.promised_bytes = 0
        self._settled_bytes = math.inf

    def fitting(self, plan: MemoryPlan) -> MemoryPlan:
        """Give the plan itself when it still fits, else the fastest one that does.

        Raises:
            MemoryShortError: Not even the smallest one fits.
        """
        usable_bytes = self._usable_bytes()
        if self._peak(plan) <= usable_bytes:
            self._adopt(plan)
            return plan
        return self._step_down(plan, usable_bytes, f"only {_shown(usable_bytes)} can be used now")

    def smaller(self, plan: MemoryPlan) -> MemoryPlan:
        """Give a clearly smaller plan, for when the memory of this one could not be had.

        Where none is clearly smaller, the smallest one is given.

        Raises:
            MemoryShortError: There is none.
        """
        peak_bytes = self._peak(plan)
        least_bytes = min(map(self._peak, self._plans))
        limit_bytes = max(int(_MUCH_SMALLER * peak_bytes), min(least_bytes, peak_bytes - 1))
        return self._step_down(plan, limit_bytes, "an allocation failed")

    def settled_bytes(self) -> float:
        """Give what the process may occupy between two micro-batches, with the last plan given."""
        return self._settled_bytes

    def _adopt(self, plan: MemoryPlan) -> None:
        self.promised_bytes = max(self.promised_bytes, self._peak(plan))
        self._settled_bytes = self._footprint.settled_bytes(plan)

    def _step_down(self, plan: MemoryPlan, limit_bytes: int, why: str) -> MemoryPlan:
        for candidate in self._plans:
            if self._peak(candidate) <= limit_bytes:
                told = f"{_described(plan)} -> {_described(candidate)}: {why}"
                LOGGER.warning("stepping down, %s", told)
                self.step_downs.append(told)
                self._adopt(candidate)
                return candidate
        least_bytes = min(map(self._peak, self._plans))
        raise MemoryShortError(
            f"{why}, and the smallest way to train this slice needs {_shown(least_bytes)}",
            remedy=MORE_MEMORY,
        )

    def _peak(self, plan: MemoryPlan) -> int:
        return self._footprint.peak_bytes(plan)


def _described(plan: MemoryPlan) -> str:
    batches = str(plan.micro_batch)
    if plan.walk_batch != plan.micro_batch:
        batches += f" of {plan.walk_batch}"
    return f"{plan.residency}, {batches} at once"


def _shown(size_bytes: int) -> str:
    return f"{size_bytes / _MEGABYTE:.0f} MB"
