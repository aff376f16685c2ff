"""A client as the whole purpose of a process: until it ends, is told to stop, or rests."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Final

from fedra_edge.client import EdgeClient
from fedra_edge.resting import CONTRIBUTED, fall_asleep, hear_signals

_LOOK_S: Final = 0.2
_STOP_SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGBREAK")


def run_in_foreground(client: EdgeClient) -> None:
    """Run a client until it ends or a signal asks for it; a second signal ends at once.

    Raises:
        FedraEdgeError: What the client ended with.
    """
    told = threading.Event()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        told.set()
        signal.signal(number, signal.SIG_DFL)

    for name in _STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)
    hear_signals()
    client.start()
    while not client.wait(_LOOK_S):
        if told.is_set():
            client.stop(_LOOK_S)
    if client.rest is not None:
        fall_asleep(client.rest, told)


def typed_command(arguments: Sequence[str]) -> tuple[str, ...]:
    """Give the command as it was typed, without what an earlier rest has added at its end."""
    is_added = len(arguments) > 1 and arguments[-2] == CONTRIBUTED
    return tuple(arguments[:-2] if is_added else arguments)
