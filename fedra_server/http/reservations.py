"""Keeps two requests from writing the same assignment's delta at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from fedra_edge.protocol.ids import AssignmentId

_TAKE_OVER_S: Final = 2.0


class Reservations:
    """The assignments whose delta some request is receiving right now."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._taken: set[AssignmentId] = set()
        self._ends: dict[AssignmentId, Callable[[], None]] = {}

    @contextmanager
    def hold(self, assignment_id: AssignmentId) -> Iterator[bool]:
        """Have an assignment's delta to oneself; gives False when another request has it."""
        with self._lock:
            is_free = assignment_id not in self._taken
            self._taken.add(assignment_id)
        try:
            yield is_free
        finally:
            if is_free:
                with self._lock:
                    self._taken.discard(assignment_id)
                    self._ends.pop(assignment_id, None)
                    self._lock.notify_all()

    def end_with(self, assignment_id: AssignmentId, end: Callable[[], None]) -> None:
        """Say, while holding an assignment's delta, how another thread ends its receipt."""
        with self._lock:
            self._ends[assignment_id] = end

    def take_over(self, assignment_id: AssignmentId) -> None:
        """End the request that receives a delta, for one of the same sender; wait a moment for it.

        A sender never sends twice at once: it has given up on the older request, whose
        connection may be dead without a word to us.
        """
        with self._lock:
            end = self._ends.get(assignment_id)
            if end is not None:
                end()
            self._lock.wait_for(lambda: assignment_id not in self._taken, _TAKE_OVER_S)

    def is_held(self, assignment_id: AssignmentId) -> bool:
        """Tell whether some request receives this assignment's delta."""
        with self._lock:
            return assignment_id in self._taken

    def __len__(self) -> int:
        """Count the deltas that are being received."""
        return len(self._taken)
