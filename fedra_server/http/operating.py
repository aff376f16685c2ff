"""What operators see and do over HTTP: runs, clients and the journal."""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, JsonValue

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import ClientId
from fedra_edge.protocol.messages import RunName
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.wire import Token
from fedra_server.chain import Entry
from fedra_server.errors import ConflictError, RefusedError
from fedra_server.http.mounting import mount
from fedra_server.http.operators import FOR_OPERATORS, Administrator, Steerer, Viewer, author
from fedra_server.http.services import ServicesHere
from fedra_server.leaving import end_membership
from fedra_server.population import ClientSummary, summarize_clients
from fedra_server.reporting import report_run
from fedra_server.reports import RunReport
from fedra_server.steering import RunStep, RunSummary, steer, summarize_run

router = APIRouter(tags=["operators"])


class RunList(BaseModel):
    """All runs, in the order they were created."""

    runs: tuple[RunSummary, ...]


class ClientList(BaseModel):
    """The population, in the order of enrolment."""

    clients: tuple[ClientSummary, ...]


class JournalEntry(BaseModel):
    """An entry of the journal; its digest covers the digest of the one before."""

    sequence: int
    at: float
    event: str
    subject: str
    by: str
    details: dict[str, JsonValue]
    previous_sha256: str
    sha256: str

    @classmethod
    def of(cls, entry: Entry) -> JournalEntry:
        """Tell of a stored entry."""
        return cls(
            sequence=entry.sequence,
            at=entry.at,
            event=entry.event,
            subject=entry.subject,
            by=entry.by,
            details=json.loads(entry.details),
            previous_sha256=entry.previous_sha256,
            sha256=entry.sha256,
        )


class JournalPage(BaseModel):
    """Entries in their order, and the newest one's NUMBER:SHA256 to keep elsewhere."""

    entries: tuple[JournalEntry, ...]
    head: str


class HeldPiece(BaseModel):
    """A piece of a delta that screening holds back until an operator decides."""

    assignment_id: str
    client_id: str
    run: str
    piece: str
    revision: int
    norm: float | None
    cosine: float | None
    reason: str
    judged_at: float


class Quarantine(BaseModel):
    """All that is held back; `fedra-server quarantine` decides on it."""

    pieces: tuple[HeldPiece, ...]


@mount(router, routes.OPERATOR_RUNS, *FOR_OPERATORS)
def list_runs(services: ServicesHere, _operator: Viewer) -> RunList:
    """List the runs."""
    store = services.store
    with store.reading():
        return RunList(runs=tuple(summarize_run(store, record) for record in store.runs()))


@mount(router, routes.OPERATOR_RUN, *FOR_OPERATORS, ProblemCode.NOT_FOUND)
def show_run(run: RunName, services: ServicesHere, _operator: Viewer) -> RunReport:
    """Show where a run stands, who it waits for, why clients failed, accuracy and costs."""
    now = services.clock.now()
    seen_since = now - services.config.heartbeat_timeout_s
    return report_run(services.store.run_history(run), seen_since, now)


@mount(
    router, routes.OPERATOR_STEER, *FOR_OPERATORS, ProblemCode.NOT_FOUND, ProblemCode.STATE_CONFLICT
)
def steer_run(run: RunName, step: RunStep, services: ServicesHere, operator: Steerer) -> RunSummary:
    """Start a run or go on with it, pause it, or stop it for good."""
    try:
        record = steer(services.store, run, step, author(operator))
    except ConflictError as error:
        raise RefusedError(ProblemCode.STATE_CONFLICT, str(error), remedy=error.remedy) from error
    services.coordinator.wake()
    return summarize_run(services.store, record)


@mount(router, routes.OPERATOR_CLIENTS, *FOR_OPERATORS)
def list_clients(
    services: ServicesHere,
    _operator: Viewer,
    *,
    include_left: Annotated[bool, Query(description="Also those that have left.")] = False,
) -> ClientList:
    """List the clients with their state, and why some get no work for a while."""
    now, timeout_s = services.clock.now(), services.config.heartbeat_timeout_s
    found = summarize_clients(services.store, now, timeout_s, include_left=include_left)
    return ClientList(clients=tuple(found))


@mount(
    router,
    routes.OPERATOR_REMOVE_CLIENT,
    *FOR_OPERATORS,
    ProblemCode.NOT_FOUND,
    status_code=204,
)
def remove_client(client_id: Token, services: ServicesHere, operator: Administrator) -> None:
    """End a client's membership at once."""
    now = services.clock.now()
    end_membership(services.store, ClientId(client_id), now, removed_by=author(operator))
    services.coordinator.wake()


@mount(router, routes.OPERATOR_QUARANTINE, *FOR_OPERATORS)
def list_quarantine(services: ServicesHere, _operator: Viewer) -> Quarantine:
    """List what screening holds back, with what it measured and why."""
    store = services.store
    with store.reading():
        return Quarantine(
            pieces=tuple(
                HeldPiece(
                    assignment_id=it.assignment_id,
                    client_id=store.assignment(it.assignment_id).client_id,
                    run=it.run,
                    piece=it.piece,
                    revision=it.revision,
                    norm=it.norm,
                    cosine=it.cosine,
                    reason=it.reason,
                    judged_at=it.judged_at,
                )
                for it in store.held_screenings()
            )
        )


@mount(router, routes.OPERATOR_JOURNAL, *FOR_OPERATORS)
def read_journal(
    services: ServicesHere,
    _operator: Viewer,
    since: Annotated[int, Query(ge=1, le=2**31 - 1, description="The first entry's number.")] = 1,
    limit: Annotated[int, Query(ge=1, le=1000, description="How many at most.")] = 100,
) -> JournalPage:
    """Read the journal; `fedra-server audit log` verifies it."""
    with services.store.reading():
        entries = tuple(map(JournalEntry.of, services.store.journal(since, limit)))
        return JournalPage(entries=entries, head=str(services.store.journal_head()))
