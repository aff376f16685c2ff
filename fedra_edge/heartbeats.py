"""Tells the server from a small thread that an assignment is being worked on."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Final, Self

from fedra_edge.api import ServerApi
from fedra_edge.errors import (
    ClientRevokedError,
    FedraEdgeError,
    NotFoundError,
    NotPermittedError,
)
from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.messages import Heartbeat

LOGGER: Final = logging.getLogger(__name__)
_FAREWELL_S: Final = 1.0


class Heartbeats:
    """Beats while its block lasts; a beat that fails is left out, the next one follows."""

    def __init__(
        self, api: ServerApi, assignment_id: AssignmentId, *, steps_total: int, interval_s: float
    ) -> None:
        self._api = api
        self._assignment_id = assignment_id
        self._steps_total = steps_total
        self._interval_s = interval_s
        self._steps_done = 0
        self._is_wanted = True
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedra-heartbeat", daemon=True)

    @property
    def is_wanted(self) -> bool:
        """Whether the round still waits for this assignment, as far as we were told."""
        return self._is_wanted

    def note(self, steps_done: int) -> None:
        """Remember how far the work is, for the next beat."""
        self._steps_done = steps_done

    def __enter__(self) -> Self:
        """Start beating."""
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop beating; a beat under way is not waited for long."""
        self._ended.set()
        self._thread.join(_FAREWELL_S)

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            beat = Heartbeat(
                assignment_id=self._assignment_id,
                steps_done=self._steps_done,
                steps_total=self._steps_total,
            )
            try:
                self._is_wanted = self._api.heartbeat(beat).is_wanted
            except (ClientRevokedError, NotFoundError, NotPermittedError):
                self._is_wanted = False
            except FedraEdgeError as error:
                LOGGER.debug("a heartbeat did not get through: %s", error)
