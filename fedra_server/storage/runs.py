"""The records of runs and of their published revisions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Final

from pydantic import JsonValue
from sqlalchemy import Connection, bindparam, func, insert, select, update

from fedra_edge.protocol.slices import RevisionManifest
from fedra_server.chain import COMMAND, Event, sha256_of
from fedra_server.errors import ConflictError, NotFoundError
from fedra_server.runs import RunState
from fedra_server.storage import tables
from fedra_server.storage.database import Database
from fedra_server.storage.journal import write_entry
from fedra_server.storage.records import RevisionRecord, RunRecord
from fedra_server.storage.rows import revision_record, revision_values, run_record, run_values

_RUNS = tables.runs.c
_RUN = select(tables.runs).where(_RUNS.run == bindparam("wanted"))
_ALL_RUNS = select(tables.runs).order_by(_RUNS.created_at, _RUNS.run)
_REVISIONS = tables.revisions.c
_LATEST = select(func.max(_REVISIONS.number)).where(_REVISIONS.run == bindparam("wanted"))
_REVISION = select(tables.revisions).where(
    _REVISIONS.run == bindparam("wanted"), _REVISIONS.number == bindparam("number")
)
_EVENTS: Final = {
    RunState.PAUSED: Event.RUN_PAUSED,
    RunState.STOPPED: Event.RUN_STOPPED,
    RunState.FINISHED: Event.RUN_FINISHED,
}


class RunRecords(Database):
    """Every method is one transaction."""

    def add_run(self, record: RunRecord, revision: RevisionRecord) -> None:
        """Create a run together with its revision 0.

        Raises:
            ConflictError: A run has this name already.
            NotFoundError: Its model is not registered.
        """
        model = select(tables.models.c.model_id).where(tables.models.c.model_id == record.model_id)
        name = select(_RUNS.run).where(_RUNS.run == record.run)
        with self.writing() as connection:
            if connection.execute(model).one_or_none() is None:
                raise NotFoundError(f"there is no model {record.model_id}")
            if connection.execute(name).one_or_none() is not None:
                raise ConflictError(
                    f"a run named {record.run!r} exists already", remedy="Choose another name."
                )
            values = run_values(record)
            connection.execute(insert(tables.runs).values(values))
            connection.execute(insert(tables.revisions).values(revision_values(revision)))
            details: dict[str, JsonValue] = {
                "model_id": record.model_id,
                "spec_sha256": sha256_of(str(values["spec"])),
                "revision_sha256": manifest_sha256(revision.manifest),
            }
            write_entry(connection, Event.RUN_CREATED, record.run, COMMAND, details)
            if record.state is RunState.RUNNING:
                write_entry(connection, Event.RUN_STARTED, record.run, COMMAND)

    def run(self, run: str) -> RunRecord:
        """Give a run.

        Raises:
            NotFoundError: No such run.
        """
        return self.read_once(("run", run), lambda connection: find_run(connection, run))

    def runs(self) -> list[RunRecord]:
        """Give all runs, in the order they were created."""
        with self.reading() as connection:
            return [run_record(row) for row in connection.execute(_ALL_RUNS).all()]

    def set_run_state(
        self, run: str, state: RunState, allowed_from: Collection[RunState], by: str = COMMAND
    ) -> RunRecord:
        """Move a run to another state, if it is in one of the allowed ones.

        ``by`` says in the journal who asked for it.

        Raises:
            NotFoundError: No such run.
            ConflictError: Its present state does not allow this.
        """
        change = update(tables.runs).where(_RUNS.run == run)
        with self.writing() as connection:
            connection.execute(_RUN.with_for_update(), {"wanted": run})
            before = find_run(connection, run)
            if before.state not in allowed_from:
                raise ConflictError(f"run {run!r} is {before.state} and cannot become {state}")
            connection.execute(change.values(state=state.value))
            write_entry(connection, _event_of(before.state, state), run, by)
            return replace(before, state=state)

    def revision(self, run: str, number: int | None = None) -> RevisionRecord:
        """Give a revision of a run, the latest unless a number is given.

        Raises:
            NotFoundError: No such run or revision.
        """
        if number is None:
            number = self.read_once(("latest", run), partial(_latest_number, run=run))
        read = partial(_find_revision, run=run, number=number)
        return self.read_lasting(("revision", run, number), read)

    def revisions(self, run: str) -> list[RevisionRecord]:
        """Give all revisions of a run, oldest first."""
        with self.reading() as connection:
            return find_revisions(connection, run)


def manifest_sha256(manifest: RevisionManifest) -> str:
    """Digest what a revision consists of: its blobs, named by their own digests."""
    return sha256_of(manifest.model_dump_json())


def _event_of(before: RunState, after: RunState) -> Event:
    if after is RunState.RUNNING:
        return Event.RUN_RESUMED if before is RunState.PAUSED else Event.RUN_STARTED
    return _EVENTS[after]


def find_run(connection: Connection, run: str) -> RunRecord:
    """Read a run inside a transaction; NotFoundError when there is none."""
    row = connection.execute(_RUN, {"wanted": run}).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no run {run!r}", remedy="See `fedra-server run list`.")
    return run_record(row)


def _latest_number(connection: Connection, *, run: str) -> int:
    number = connection.execute(_LATEST, {"wanted": run}).scalar_one()
    if number is None:
        raise NotFoundError(f"there is no run {run!r} with any revision")
    return int(number)


def _find_revision(connection: Connection, *, run: str, number: int) -> RevisionRecord:
    row = connection.execute(_REVISION, {"wanted": run, "number": number}).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no run {run!r} with a revision {number}")
    return revision_record(row)


def find_revisions(connection: Connection, run: str) -> list[RevisionRecord]:
    """Read a run's revisions inside a transaction, oldest first."""
    query = select(tables.revisions).where(_REVISIONS.run == run).order_by(_REVISIONS.number)
    return [revision_record(row) for row in connection.execute(query).all()]
