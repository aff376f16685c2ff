"""The accuracy counts that clients report."""

from __future__ import annotations

from fastapi import APIRouter

from fedra_edge.protocol import routes
from fedra_edge.protocol.ids import RevisionNumber, RunId
from fedra_edge.protocol.problems import ProblemCode
from fedra_edge.protocol.rounds import Evaluation
from fedra_server.errors import NotPermittedError
from fedra_server.http.auth import Caller, SpeaksProtocol
from fedra_server.http.mounting import FOR_CLIENTS, mount
from fedra_server.http.services import ServicesHere

router = APIRouter(tags=["evaluations"], dependencies=[SpeaksProtocol])


@mount(
    router,
    routes.EVALUATION,
    *FOR_CLIENTS,
    ProblemCode.NOT_FOUND,
    ProblemCode.NOT_PERMITTED,
    status_code=204,
)
def report_evaluation(evaluation: Evaluation, services: ServicesHere, client: Caller) -> None:
    """Keep a client's counts on a revision; sending them again replaces them."""
    if client.run not in {None, evaluation.run}:
        raise NotPermittedError(f"this client takes part in run {client.run} only")
    services.store.revision(RunId(evaluation.run), RevisionNumber(evaluation.revision))
    services.store.add_evaluation(client.client_id, evaluation)
    services.coordinator.wake()
