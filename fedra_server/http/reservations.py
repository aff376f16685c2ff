"""Keeps two requests from writing the same assignment's delta at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fedra_edge.protocol.ids import AssignmentId


class Reservations:
    """The assignments whose delta some request is receiving right now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: set[AssignmentId] = set()

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

    def is_held(self, assignment_id: AssignmentId) -> bool:
        """Tell whether some request receives this assignment's delta."""
        with self._lock:
            return assignment_id in self._taken
