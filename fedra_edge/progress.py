"""What a client is doing, as a value that other threads and programs may look at."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

LOGGER: Final = logging.getLogger(__name__)


class Phase(StrEnum):
    """The stages of a client's life."""

    STARTING = "starting"
    CONNECTING = "connecting"
    WAITING = "waiting"
    PAUSED = "paused"
    CALIBRATING = "calibrating"
    DOWNLOADING = "downloading"
    EVALUATING = "evaluating"
    TRAINING = "training"
    SENDING = "sending"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class ClientProgress:
    """A moment in a client's life; ``detail`` is a sentence for people.

    ``loss`` is the mean of the last step, ``accuracy`` that of the last evaluation,
    ``rounds_contributed`` counts the deltas that the server took since this client started.
    ``transfer_bytes_total`` is not 0 while a download or a delivery takes more than a moment.
    """

    phase: Phase = Phase.STARTING
    detail: str = ""
    client_id: str | None = None
    run: str | None = None
    round_number: int | None = None
    steps_done: int = 0
    steps_total: int = 0
    loss: float | None = None
    accuracy: float | None = None
    evaluated_revision: int | None = None
    rounds_contributed: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    transfer_bytes_done: int = 0
    transfer_bytes_total: int = 0


_NO_TRANSFER: Final = {"transfer_bytes_done": 0, "transfer_bytes_total": 0}

OnProgress = Callable[[ClientProgress], None]


class ProgressBoard:
    """Holds the present progress and tells one listener of every change, one at a time."""

    def __init__(self, on_progress: OnProgress | None = None, contributed: int = 0) -> None:
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._current = ClientProgress(rounds_contributed=contributed)
        self._telling = threading.RLock()
        self._teller: int | None = None

    @property
    def current(self) -> ClientProgress:
        """The present progress."""
        with self._lock:
            return self._current

    @property
    def is_telling(self) -> bool:
        """Whether this very thread is in the listener's hands."""
        return self._teller == threading.get_ident()

    def update(self, **changes: Any) -> None:  # noqa: ANN401 (the fields of ClientProgress)
        """Change some fields; a listener that fails is logged and never stops the client.

        A transfer belongs to the phase that it was shown in.
        """
        if "phase" in changes:
            changes = {**_NO_TRANSFER, **changes}
        with self._lock:
            before = self._current
            self._current = now = dataclasses.replace(before, **changes)
        if self._on_progress is None or now == before:
            return
        with self._telling:
            self._teller = threading.get_ident()
            try:
                self._on_progress(now)
            except Exception:
                LOGGER.exception("the progress callback failed; the client goes on")
            finally:
                self._teller = None
