"""Wakes every waiting long-poll when the coordinator changed something, from any thread."""

from __future__ import annotations

import asyncio


class ChangeSignal:
    """A broadcast from threads to coroutines; a waiter holds one future and no thread.

    Take ``next_change`` before you read the state: a change between the read and the wait then
    ends the wait at once instead of being missed.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._change = asyncio.Event()
        self.is_closing = False

    def bind(self) -> None:
        """Deliver to the running event loop from now on."""
        self._loop = asyncio.get_running_loop()
        self._change = asyncio.Event()
        self.is_closing = False

    def notify(self) -> None:
        """Tell all waiters that something changed; callable from any thread at any time."""
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(self._release)
        except RuntimeError:  # the loop has closed: nobody waits any more
            self._loop = None

    def close(self) -> None:
        """Let every waiter go for good; to be called on the event loop."""
        self.is_closing = True
        self._release()

    def next_change(self) -> asyncio.Event:
        """Give the event that the next change will set."""
        return self._change

    def _release(self) -> None:
        released, self._change = self._change, asyncio.Event()
        released.set()
