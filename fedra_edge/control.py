"""Pause, resume and stop, asked for by one thread and obeyed by another."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Control:
    """The wishes of whoever embeds the client; all methods may be called from any thread."""

    def __init__(self, on_stop: Callable[[], None] | None = None) -> None:
        self.stopping = threading.Event()
        self._on_stop = on_stop
        self._stop_lock = threading.RLock()
        self._running = threading.Event()
        self._running.set()

    @property
    def is_stopping(self) -> bool:
        """Whether a stop was asked for; it cannot be taken back."""
        return self.stopping.is_set()

    @property
    def is_paused(self) -> bool:
        """Whether work should rest."""
        return not self._running.is_set() and not self.is_stopping

    def pause(self) -> None:
        """Ask for a rest at the next step."""
        self._running.clear()

    def resume(self) -> None:
        """End a pause."""
        self._running.set()

    def stop(self) -> None:
        """Ask for an end; ends a pause as well."""
        with self._stop_lock:
            self.stopping.set()
            self._running.set()
            if self._on_stop is not None:
                self._on_stop()

    def settle(self) -> None:
        """Return when no call of ``stop`` is under way."""
        with self._stop_lock:
            pass

    def wait_while_paused(self) -> None:
        """Return when no pause is wished, or a stop is."""
        self._running.wait()
