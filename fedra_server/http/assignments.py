"""What a client should do next: the long-poll, and the report that it cannot."""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import AssignmentId
from fedra_edge.protocol.messages import FailureReport
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.rounds import Assignment, Wait
from fedra_edge.protocol.wire import Token
from fedra_server.guidance import guide
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
        assignment = await run_in_threadpool(_guide, services, client)
        if services.changes.is_closing or not _is_idle(assignment):
            return assignment
        try:
            async with asyncio.timeout_at(min(deadline, sign_at)):
                await change.wait()
        except TimeoutError:
            if now() >= deadline or await request.is_disconnected():
                return assignment
            if not await run_in_threadpool(_show_alive, services, client):
                return assignment
            sign_at = now() + sign_s


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


def _guide(services: Services, client: ClientRecord) -> Assignment:
    """Find what to do next in one view of the records."""
    with services.store.reading():
        return guide(services.store, client, services.clock.now())


def _show_alive(services: Services, client: ClientRecord) -> bool:
    """Note a sign of life, unless the client has said goodbye on another connection."""
    if not services.store.client(client.client_id).is_online:
        return False
    services.store.touch(client.client_id, services.clock.now())
    return True


def _is_idle(assignment: Assignment) -> bool:
    """Tell whether there is nothing at all to do, so that the answer can be held back."""
    return (
        isinstance(assignment, Wait)
        and assignment.calibrate is None
        and assignment.evaluate is None
    )
