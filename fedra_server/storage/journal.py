"""The journal's records: appended in the transaction of what they tell, never changed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Final, NamedTuple

from pydantic import JsonValue
from sqlalchemy import Connection, insert, select, text

from fedra_server.chain import (
    BEFORE_ALL,
    COMMAND,
    BrokenChain,
    Entry,
    Event,
    Head,
    entry_after,
    head_of,
    verify,
)
from fedra_server.errors import StorageError
from fedra_server.storage import tables
from fedra_server.storage.database import Database

_JOURNAL: Final = tables.journal.c
_TAIL: Final = (
    select(_JOURNAL.sequence, _JOURNAL.sha256).order_by(_JOURNAL.sequence.desc()).limit(1)
)
_LONGEST_SUBJECT: Final = 200
_ROWS_AT_ONCE: Final = 500
_POSTGRES_LOCK: Final = 0x6665646A
NOTHING: Final[Mapping[str, JsonValue]] = MappingProxyType({})


class Happening(NamedTuple):
    """What an entry tells: what happened to what, and who did it."""

    event: Event
    subject: str
    by: str
    details: Mapping[str, JsonValue] = NOTHING


def write_entry(
    connection: Connection,
    event: Event,
    subject: str,
    by: str,
    details: Mapping[str, JsonValue] = NOTHING,
) -> None:
    """Append an entry inside the transaction that makes it true.

    Call it as the transaction's last step: it holds the end of the chain until the commit, so
    that several processes write one chain. No secret and nothing about a person belongs here.
    """
    write_entries(connection, Happening(event, subject, by, details))


def write_entries(connection: Connection, *happenings: Happening) -> None:
    """Append several entries inside the transaction that makes them true."""
    head = _locked_head(connection)
    entries = []
    for event, subject, by, details in happenings:
        entry = entry_after(
            head, time.time(), event,
            subject=subject[:_LONGEST_SUBJECT], by=by, details=dict(details),
        )  # fmt: skip
        entries.append(asdict(entry))
        head = head_of(entry)
    connection.execute(insert(tables.journal), entries)


class Journal(Database):
    """Every method is one transaction."""

    def note(
        self,
        event: Event,
        subject: str,
        details: Mapping[str, JsonValue] = NOTHING,
        *,
        by: str = COMMAND,
    ) -> None:
        """Append an entry about what changes no record."""
        with self.writing() as connection:
            write_entry(connection, event, subject, by, details)

    def journal_head(self) -> Head:
        """Give the newest entry's number and digest."""
        with self.reading() as connection:
            return _head(connection)

    def journal(
        self, since: int = 1, limit: int | None = None, *, rows_at_once: int = _ROWS_AT_ONCE
    ) -> Iterator[Entry]:
        """Give entries in their order, from a number on, without holding all in memory."""
        query = select(tables.journal).where(_JOURNAL.sequence >= since).order_by(_JOURNAL.sequence)
        if limit is not None:
            query = query.limit(limit)
        with self.reading() as connection:
            rows = connection.execute(query.execution_options(yield_per=rows_at_once))
            for row in rows.mappings():
                yield Entry(**row)

    def verify_journal(self, expected: Head | None = None) -> Head | BrokenChain:
        """Follow the chain through all entries, those too that the database cannot give."""
        with self.reading():
            try:
                return verify(self.journal(), expected)
            except StorageError:
                return self._verify_one_by_one()

    def _verify_one_by_one(self) -> Head | BrokenChain:
        reached = 0

        def reading() -> Iterator[Entry]:
            nonlocal reached
            for entry in self.journal(rows_at_once=1):
                reached = entry.sequence
                yield entry

        try:
            return verify(reading())
        except StorageError:
            return BrokenChain(reached + 1, "it cannot be read")


def _locked_head(connection: Connection) -> Head:
    """Give the end of the chain, which nobody else can extend until this transaction ends.

    SQLite's writer holds the whole file already.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRES_LOCK})
    return _head(connection)


def _head(connection: Connection) -> Head:
    row = connection.execute(_TAIL).one_or_none()
    return BEFORE_ALL if row is None else Head(row.sequence, row.sha256)
