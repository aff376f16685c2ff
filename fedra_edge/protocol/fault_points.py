"""Named places where a test has a process kill itself, to prove that nothing is lost there.

``FEDRA_FAULT_POINT=publish.decided`` kills the process where it first comes to that place,
``publish.decided:3`` where it comes there for the third time. Nothing happens otherwise.
"""

from __future__ import annotations

import itertools
import os
import signal
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

FAULT_VARIABLE: Final = "FEDRA_FAULT_POINT"

FaultPoint = Literal[
    # the server
    "assign.decided",  # the cohort is drawn, nothing is recorded
    "assign.recorded",
    "enrol.recorded",  # a client is enrolled, and has not heard of it
    "key.changed",  # a client's new key holds, and it has not heard of it
    "upload.created",
    "upload.written",  # some bytes of a delta are in the file, not synced
    "upload.received",  # all bytes of a request are in the file, not synced
    "upload.synced",
    "upload.complete",  # the last byte is on the disk, admission has not begun
    "admission.checked",  # the delta is good, and still in the place of uploads
    "admission.moved",  # it is among the deltas, and not recorded
    "admission.recorded",  # it counts, and its sender has not heard of it
    "merge.piece",  # all pieces are written, some have their names, which may not last yet
    "publish.decided",  # all blobs of the revision are stored, nothing is recorded
    "publish.written",  # inside the transaction that publishes
    "publish.recorded",
    "migrate.step",  # a step is taken inside the transaction of all steps
    "collect.aside",  # a file nobody refers to is out of its place, and not deleted
    "collect.deleted",
    "prune.recorded",  # deltas are let go in the records, their files are there
    # the client
    "enrol.made",  # the key is on the disk, nobody has heard of it
    "enrol.received",  # the server has a new member, which does not know it yet
    "rotate.made",  # the next key is on the disk beside the current one
    "rotate.told",  # the server knows the next key only, which is still called so
    "download.part",  # some bytes of a file are there
    "checkpoint.begun",  # a part of a checkpoint is written beside the last one
    "checkpoint.saved",
    "outbox.tensors",  # the tensors of a delta are on the disk, its manifest is not
    "outbox.kept",  # the delta is on the disk, nothing was sent
    "send.received",  # the server has the delta and said so, the outbox still holds it
]
FAULT_POINTS: Final[frozenset[str]] = frozenset(get_args(FaultPoint))

_KILL: Final = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows: TerminateProcess


@dataclass(frozen=True)
class Fault:
    """A place to die at, and the count of visits to it."""

    name: str
    nth: int = 1
    visits: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @classmethod
    def parse(cls, text: str) -> Fault | None:
        """Read ``NAME`` or ``NAME:NTH``; no text means no fault.

        Raises:
            ValueError: There is no such place, or no such visit.
        """
        if not text:
            return None
        name, colon, nth = text.partition(":")
        nth = nth if colon else "1"
        if name not in FAULT_POINTS or not nth.isdecimal() or int(nth) == 0:
            known = ", ".join(sorted(FAULT_POINTS))
            raise ValueError(f"{FAULT_VARIABLE}={text!r}: use NAME or NAME:NTH with one of {known}")
        return cls(name, int(nth))


_ARMED: Final = Fault.parse(os.environ.get(FAULT_VARIABLE, ""))


def fault_point(name: FaultPoint) -> None:
    """End the process here, as a power cut would, if that is what the environment asks for."""
    if _ARMED is not None and _ARMED.name == name and next(_ARMED.visits) == _ARMED.nth:
        os.kill(os.getpid(), _KILL)
