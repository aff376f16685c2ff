"""Counts over all records, for those who watch the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select

from fedra_server.storage import tables
from fedra_server.storage.database import Database

_ASSIGNMENTS = tables.assignments.c
_CLIENTS = tables.clients.c
_REVISIONS = tables.revisions.c
_RUNS = tables.runs.c


@dataclass(frozen=True)
class Tally:
    """What there is at one moment, by run and by state."""

    revisions: Mapping[str, int]
    assignments: Mapping[tuple[str, str], int]
    runs: Mapping[str, str]
    clients: int
    clients_online: int
    journal_entries: int


class Tallies(Database):
    """Every method is one transaction."""

    def tally(self, seen_since: float) -> Tally:
        """Count; a client that was last seen before a moment counts as gone."""
        newest = select(_REVISIONS.run, func.max(_REVISIONS.number)).group_by(_REVISIONS.run)
        work = select(_ASSIGNMENTS.run, _ASSIGNMENTS.state, func.count()).group_by(
            _ASSIGNMENTS.run, _ASSIGNMENTS.state
        )
        members = select(func.count()).where(_CLIENTS.has_left.is_(False))
        online = members.where(_CLIENTS.is_online, _CLIENTS.last_seen_at >= seen_since)
        states = select(_RUNS.run, _RUNS.state)
        newest_entry = select(func.coalesce(func.max(tables.journal.c.sequence), 0))
        with self.reading() as connection:
            return Tally(
                revisions=dict(connection.execute(newest).all()),
                assignments={(run, state): it for run, state, it in connection.execute(work)},
                runs=dict(connection.execute(states).all()),
                clients=connection.execute(members).scalar_one(),
                clients_online=connection.execute(online).scalar_one(),
                journal_entries=connection.execute(newest_entry).scalar_one(),
            )
