"""What a client should do next: the long-poll, and the report that it cannot."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.messages import FailureReport
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.rounds import Assignment
from fedra_edge.protocol.wire import Token
from fedra_server.guidance import explain_waiting, find_work
from fedra_server.http.auth import Caller, SpeaksProtocol
from fedra_server.http.clients import give_up, own_assignment
from fedra_server.http.mounting import FOR_CLIENTS, mount
from fedra_server.http.services import Services, ServicesHere
from fedra_server.storage.records import ClientRecord

_SIGNS_PER_TIMEOUT: Final = 3
"""How often, in the time after which a silent client counts as gone, a held poll shows it alive."""

router = APIRouter(tags=["assignments"], dependencies=[SpeaksProtocol])


@mount(router, routes.ASSIGNMENT, *FOR_CLIENTS)
async def next_assignment(
    request: Request,
    services: ServicesHere,
    client: Caller,
    wait_s: Annotated[float, Query(ge=0, allow_inf_nan=False)] = 0.0,
) -> Assignment:
    """Answer as soon as there is something to do, at the latest after ``wait_s`` seconds.

    A waiting request holds no thread. Longer waits than the protocol allows are cut. A client
    whose request waits is alive, whatever the time after which silent ones count as gone.
    """
    if services.is_sign_due(client):
        await run_in_threadpool(services.store.touch, client.client_id, services.clock.now())
    if not client.is_online:
        services.coordinator.wake()
    now = asyncio.get_running_loop().time
    deadline = now() + min(wait_s, routes.MAX_POLL_S)
    sign_s = services.config.heartbeat_timeout_s / _SIGNS_PER_TIMEOUT
    sign_at = now() + sign_s
    while True:
        change = services.changes.next_change()
        work = await run_in_threadpool(_find_work, services, client)
        if work is not None:
            return work
        if services.changes.is_closing or now() >= deadline or await request.is_disconnected():
            return await run_in_threadpool(_explain_waiting, services, client)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(min(deadline, sign_at)):
                await change.wait()
        if now() >= sign_at:
            sign_at = now() + sign_s
            if not await run_in_threadpool(_show_alive, services, client):
                deadline = now()


@mount(
    router,
    routes.FAILURE,
    *FOR_CLIENTS,
    ProblemCode.NOT_FOUND,
    ProblemCode.NOT_PERMITTED,
    status_code=204,
)
def report_failure(
    assignment_id: Token, report: FailureReport, services: ServicesHere, client: Caller
) -> None:
    """Stop waiting for a participant that says it cannot finish; repeating it is harmless."""
    assignment = own_assignment(services, client, AssignmentId(assignment_id))
    give_up(services, assignment, report.detail)


def _find_work(services: Services, client: ClientRecord) -> Assignment | None:
    """Find what to do in one view of the records."""
    with services.store.reading():
        return find_work(services.store, client, services.clock.now())


def _explain_waiting(services: Services, client: ClientRecord) -> Assignment:
    """Say why there is nothing to do, in one view of the records."""
    with services.store.reading():
        return explain_waiting(services.store, client, services.clock.now())


def _show_alive(services: Services, client: ClientRecord) -> bool:
    """Note a sign of life, unless the client has said goodbye on another connection."""
    if not services.store.client(client.client_id).is_online:
        return False
    services.store.touch(client.client_id, services.clock.now())
    return True
