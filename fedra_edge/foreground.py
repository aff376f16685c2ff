"""A client as the whole purpose of a process: until it ends, is told to stop, or rests."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Final

from fedra_edge.client import EdgeClient, Resting
from fedra_edge.protocol.trust import JoinString, is_join_string
from fedra_edge.resting import CONTRIBUTED, fall_asleep, hear_signals, take_session

_LOOK_S: Final = 0.2
_MOST_BYTES: Final = 2**15
"""Far below what Linux takes as one argument, which the command becomes part of."""

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


def resting_of(arguments: Sequence[str], contributed: int) -> Resting | None:
    """Say how the command that was typed can rest; None when it is too long to be carried along.

    What an earlier rest has added behind the command's name is taken out, and so is the secret of
    a join string: everybody on the machine can read command lines, and the address is enough now.
    """
    session = take_session()
    if sum(len(os.fsencode(argument)) + 1 for argument in arguments) > _MOST_BYTES:
        return None
    name, *typed = arguments
    if typed[:1] == [CONTRIBUTED]:
        typed = typed[2:]
    return Resting((name, *map(_without_secret, typed)), contributed, session)


def _without_secret(argument: str) -> str:
    """Leave the address of a join string."""
    option, equals, value = argument.partition("=") if argument[:2] == "--" else ("", "", argument)
    if not is_join_string(value):
        return argument
    try:
        return f"{option}{equals}{JoinString.parse(value).address}"
    except ValueError:
        return argument
