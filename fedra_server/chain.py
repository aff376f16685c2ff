"""The journal as a chain: what an entry is, its digest, and where a chain is broken.

Each entry's digest covers the digest of the one before it, so nobody can change, leave out, insert
or reorder entries without changing every digest that follows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from pydantic import JsonValue
from typing_extensions import override

_HEAD: Final = re.compile(r"[1-9][0-9]{0,17}:[0-9a-f]{64}", re.ASCII)
GENESIS: Final = "0" * 64
"""What the first entry has in place of an earlier entry's digest."""
SERVER: Final = "server"
COMMAND: Final = "command"
"""Who did it, where it was neither a client nor an operator over HTTP."""


class Event(StrEnum):
    """Everything that the journal tells of."""

    JOURNAL_BEGUN = "journal-begun"
    SERVER_STARTED = "server-started"
    CLIENT_JOINED = "client-joined"
    CLIENT_REENROLLED = "client-re-enrolled"
    CLIENT_KEY_CHANGED = "client-key-changed"
    CLIENT_LEFT = "client-left"
    CLIENT_REMOVED = "client-removed"
    TOKEN_CREATED = "token-created"  # noqa: S105 (an event)
    TOKEN_REVOKED = "token-revoked"  # noqa: S105 (an event)
    OPERATOR_ADDED = "operator-added"
    OPERATOR_REMOVED = "operator-removed"
    MODEL_REGISTERED = "model-registered"
    RUN_CREATED = "run-created"
    RUN_STARTED = "run-started"
    RUN_PAUSED = "run-paused"
    RUN_RESUMED = "run-resumed"
    RUN_STOPPED = "run-stopped"
    RUN_FINISHED = "run-finished"
    RUN_PRUNED = "run-pruned"
    ROUND_PLANNED = "round-planned"
    DELTA_RECEIVED = "delta-received"
    DELTA_ADMITTED = "delta-admitted"
    DELTA_REFUSED = "delta-refused"
    DELTA_QUARANTINED = "delta-quarantined"
    DELTA_RELEASED = "delta-released"
    DELTA_DISCARDED = "delta-discarded"
    REVISION_PUBLISHED = "revision-published"
    REVISION_EXPORTED = "revision-exported"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry as it is stored; ``details`` is canonical JSON, ``at`` by the machine's clock."""

    sequence: int
    at: float
    event: str
    subject: str
    by: str
    details: str
    previous_sha256: str
    sha256: str


@dataclass(frozen=True)
class Head:
    """The newest entry of a chain: whoever keeps it elsewhere can tell later that none is lost."""

    sequence: int
    sha256: str

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read what ``str`` wrote; ValueError when it is something else."""
        if _HEAD.fullmatch(text) is None:
            raise ValueError("a head is written NUMBER:SHA256")
        sequence, _, sha256 = text.partition(":")
        return cls(int(sequence), sha256)

    @override
    def __str__(self) -> str:
        return f"{self.sequence}:{self.sha256}"


@dataclass(frozen=True)
class BrokenChain:
    """The first entry that cannot be what was written, and why."""

    sequence: int
    detail: str


BEFORE_ALL: Final = Head(0, GENESIS)


def author(client_id: str) -> str:
    """Name a client as the one who did something."""
    return f"client {client_id}"


def canonical(value: JsonValue | Mapping[str, JsonValue]) -> str:
    """Write JSON in the one form that digests are taken of."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def sha256_of(text: str) -> str:
    """Digest a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def entry_after(
    head: Head, at: float, event: Event, *, subject: str, by: str, details: Mapping[str, JsonValue]
) -> Entry:
    """Make the entry that follows a head."""
    told = (head.sequence + 1, at, event.value, subject, by, canonical(details), head.sha256)
    return Entry(*told, sha256=_digest(told))


def head_of(entry: Entry) -> Head:
    """Name an entry, so that the next can follow it."""
    return Head(entry.sequence, entry.sha256)


def verify(entries: Iterable[Entry], expected: Head | None = None) -> Head | BrokenChain:
    """Follow a chain from its first entry; give its head, or where it is broken.

    ``expected`` is a head that was kept elsewhere: a chain that was cut before it, or made anew
    since, does not contain it.
    """
    head = BEFORE_ALL
    for entry in entries:
        fault = _fault(entry, head)
        if fault:
            return BrokenChain(head.sequence + 1, fault)
        head = head_of(entry)
        if expected is not None and expected.sequence == head.sequence and expected != head:
            return BrokenChain(head.sequence, f"it was {expected.sha256}, and is {head.sha256}")
    if head == BEFORE_ALL:
        return BrokenChain(1, "there is no entry, though every journal begins with one")
    if expected is not None and not 0 < expected.sequence <= head.sequence:
        return BrokenChain(head.sequence + 1, f"the journal ends before entry {expected.sequence}")
    return head


def _fault(entry: Entry, head: Head) -> str:
    """Say why an entry cannot follow a head; empty when it does."""
    if entry.sequence != head.sequence + 1:
        return f"it is missing; entry {entry.sequence} comes next"
    if entry.previous_sha256 != head.sha256:
        return "it does not follow the entry before it"
    told = (
        entry.sequence,
        entry.at,
        entry.event,
        entry.subject,
        entry.by,
        entry.details,
        entry.previous_sha256,
    )
    try:
        is_intact = _digest(told) == entry.sha256
    except (TypeError, ValueError):  # what a database gave is no text or number any more
        is_intact = False
    return "" if is_intact else "it is not what was written"


def _digest(told: tuple[JsonValue, ...]) -> str:
    return sha256_of(canonical(list(told)))
