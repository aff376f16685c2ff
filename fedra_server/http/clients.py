"""A client's membership: enrol, come back, report, go offline, leave."""

from __future__ import annotations

import secrets

from fastapi import APIRouter

from fedra_edge.protocol import routes
from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.ids import AssignmentId, ClientId
from fedra_edge.protocol.messages import (
    ClientStatus,
    EnrolReceipt,
    EnrolRequest,
    Heartbeat,
    HeartbeatReceipt,
    RejoinRequest,
)
from fedra_edge.protocol.problems import Problem, ProblemCode
from fedra_edge.protocol.trust import KeyChange, enrolment_message, key_message
from fedra_server.errors import ConflictError, NotFoundError, NotPermittedError, RefusedError
from fedra_server.http.auth import Caller, SpeaksProtocol
from fedra_server.http.mounting import FOR_CLIENTS, mount
from fedra_server.http.services import Services, ServicesHere
from fedra_server.leaving import end_membership
from fedra_server.runs import AssignmentState
from fedra_server.signatures import check_signature
from fedra_server.storage.records import AssignmentRecord, ClientRecord
from fedra_server.storage.tokens import require_member

router = APIRouter(tags=["clients"], dependencies=[SpeaksProtocol])


@mount(
    router,
    routes.ENROL,
    ProblemCode.PROTOCOL_MISMATCH,
    ProblemCode.JOIN_TOKEN_INVALID,
    ProblemCode.SIGNATURE_INVALID,
    ProblemCode.CLIENT_REVOKED,
    ProblemCode.NOT_FOUND,
    ProblemCode.NOT_PERMITTED,
    status_code=201,
    responses={503: {"model": Problem, "description": "Too many machines enrol at once."}},
)
def enrol(request: EnrolRequest, services: ServicesHere) -> EnrolReceipt:
    """Take who holds a key into the population, once however often it is asked."""
    message = enrolment_message(
        services.authority.ca_sha256, request.public_key, request.join_secret
    )
    check_signature(request.public_key, request.signature, message)
    known = services.store.client_with_key(request.public_key)
    if known is not None:
        return EnrolReceipt(client_id=require_member(known).client_id)
    now = services.clock.now()
    _require_admission(services, request.join_secret, now)
    _require_run(services, request.run)
    client = ClientRecord(
        client_id=ClientId(secrets.token_hex(8)),
        name=request.name,
        run=request.run,
        profile=request.profile,
        enrolled_at=now,
        last_seen_at=now,
        is_online=True,
        has_left=False,
    )
    with services.enrolments.enter(now, services.config.max_enrolments_per_minute):
        enrolled = services.store.enrol(
            client, request.public_key, request.join_secret, services.config.max_clients
        )
    services.sessions.end_all(enrolled.client_id)
    fault_point("enrol.recorded")
    services.coordinator.wake()
    return EnrolReceipt(client_id=enrolled.client_id)


@mount(
    router,
    routes.CHANGE_KEY,
    *FOR_CLIENTS,
    ProblemCode.SIGNATURE_INVALID,
    ProblemCode.NOT_PERMITTED,
    status_code=204,
)
def change_key(change: KeyChange, services: ServicesHere, client: Caller) -> None:
    """Let a new key take the place of a client's, which agrees; its sessions end.

    Repeating it, after a lost answer, changes nothing.
    """
    message = key_message(services.authority.ca_sha256, client.client_id, change.public_key)
    check_signature(change.public_key, change.signature, message)
    previous = services.store.key_of(client.client_id)
    if previous == change.public_key:
        return
    check_signature(previous, change.previous_signature, message)
    services.key_changes.enter(client.client_id, services.clock.now())
    try:
        services.store.change_key(client.client_id, change.public_key, previous)
    except ConflictError as error:
        raise NotPermittedError("this key is of another client") from error
    services.sessions.end_all(client.client_id)
    fault_point("key.changed")


@mount(router, routes.REJOIN, *FOR_CLIENTS, ProblemCode.NOT_FOUND, ProblemCode.NOT_PERMITTED)
def rejoin(request: RejoinRequest, services: ServicesHere, client: Caller) -> ClientStatus:
    """Note that a client is back, perhaps changed, renamed or for another run."""
    _require_run(services, request.run)
    now = services.clock.now()
    services.store.rejoin(client.client_id, request.profile, request.run, now, request.name)
    services.coordinator.wake()
    return _status(services, services.store.client(client.client_id))


@mount(router, routes.CLIENT_STATUS, *FOR_CLIENTS)
def status(services: ServicesHere, client: Caller) -> ClientStatus:
    """Tell a client what the server knows of it."""
    return _status(services, client)


@mount(router, routes.LEAVE, *FOR_CLIENTS, status_code=204)
def leave(services: ServicesHere, client: Caller) -> None:
    """End a membership: key and sessions stop working, nobody waits for the client."""
    end_membership(services.store, client.client_id, services.clock.now())
    services.coordinator.wake()


@mount(router, routes.OFFLINE, *FOR_CLIENTS, status_code=204)
def go_offline(services: ServicesHere, client: Caller) -> None:
    """Note that a client stops for now: nobody waits for it, but it may come back to its work."""
    services.store.set_offline(client.client_id, services.clock.now())
    services.coordinator.wake()


@mount(router, routes.HEARTBEAT, *FOR_CLIENTS, ProblemCode.NOT_FOUND, ProblemCode.NOT_PERMITTED)
def heartbeat(beat: Heartbeat, services: ServicesHere, client: Caller) -> HeartbeatReceipt:
    """Note that a participant is alive; tell it whether its work is still awaited."""
    if services.is_sign_due(client):
        services.store.touch(client.client_id, services.clock.now())
    assignment = own_assignment(services, client, AssignmentId(beat.assignment_id))
    awaited = services.store.open_assignment(client.client_id)
    return HeartbeatReceipt(
        is_wanted=awaited is not None and awaited.assignment_id == assignment.assignment_id
    )


@mount(router, routes.CALIBRATE, *FOR_CLIENTS, ProblemCode.NOT_FOUND, status_code=204)
def calibrate(calibration: Calibration, services: ServicesHere, client: Caller) -> None:
    """Keep what a model's block costs on the client's machine; it may now enter cohorts."""
    services.store.model(calibration.model_id)
    services.store.set_calibration(client.client_id, calibration)
    services.coordinator.wake()


def own_assignment(
    services: Services, client: ClientRecord, assignment_id: AssignmentId
) -> AssignmentRecord:
    """Find an assignment and make sure that it is the caller's.

    Raises:
        NotFoundError: There is no such assignment.
        NotPermittedError: It belongs to another client.
    """
    assignment = services.store.assignment(assignment_id)
    if assignment.client_id != client.client_id:
        raise NotPermittedError("this assignment belongs to another client")
    return assignment


def give_up(services: Services, assignment: AssignmentRecord, detail: str) -> None:
    """Stop waiting for an assignment; one that is settled already stays as it is."""
    if assignment.state is not AssignmentState.PENDING:
        return
    try:
        services.store.settle(
            assignment.assignment_id, AssignmentState.FAILED, detail, services.clock.now()
        )
    except ConflictError:  # settled meanwhile by its delta or by the deadline: better
        return
    services.coordinator.wake()


def _require_admission(services: Services, join_secret: str | None, now: float) -> None:
    """Refuse whom no join token admits, before anything else is looked up for them."""
    if join_secret is not None:
        services.store.check_join_secret(join_secret, now)
    elif services.config.enrolment != "open":
        raise RefusedError(
            ProblemCode.JOIN_TOKEN_INVALID, "this server takes new clients by join string only"
        )


def _require_run(services: Services, run: str | None) -> None:
    """Refuse a misspelt run at once: a client bound to it would wait for ever."""
    if run is not None and all(record.run != run for record in services.store.runs()):
        raise NotFoundError(
            f"there is no run {run!r} on this server",
            remedy="Check the name given with --run, or ask the operator to create the run first.",
        )


def _status(services: Services, client: ClientRecord) -> ClientStatus:
    assignment = services.store.open_assignment(client.client_id)
    return ClientStatus(
        client_id=client.client_id,
        name=client.name,
        run=client.run,
        is_online=client.is_online,
        rounds_contributed=services.store.rounds_contributed(client.client_id),
        open_assignment=None if assignment is None else assignment.assignment_id,
    )
