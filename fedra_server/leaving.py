"""Ending a membership, asked for by the client or by the operator: nobody waits for it any more."""

from __future__ import annotations

from contextlib import suppress

from fedra_edge.protocol.ids import ClientId
from fedra_server.errors import ConflictError
from fedra_server.runs import AssignmentState
from fedra_server.storage.store import Store


def end_membership(
    store: Store, client_id: ClientId, now: float, *, removed_by: str | None = None
) -> None:
    """End a membership at once; what the client delivered before stays.

    Raises:
        NotFoundError: No such client, or its membership is over already.
    """
    store.leave(client_id, now, removed_by=removed_by)
    assignment = store.open_assignment(client_id)
    if assignment is not None:
        detail = "the client left" if removed_by is None else "the operator removed the client"
        with suppress(ConflictError):  # settled meanwhile by its delta or by the deadline
            store.settle(assignment.assignment_id, AssignmentState.FAILED, detail, now)
