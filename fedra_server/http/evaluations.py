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
from fedra_server.http.services import Services, ServicesHere
from fedra_server.storage.records import ClientRecord

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
    _require_own_examples(services, client, evaluation)
    services.store.add_evaluation(client.client_id, evaluation)
    services.coordinator.wake()


def _require_own_examples(services: Services, client: ClientRecord, evaluation: Evaluation) -> None:
    """Count a client with the examples it has, so that none outweighs the others at will."""
    model_id = services.store.run(RunId(evaluation.run)).model_id
    calibration = services.store.calibrations(model_id).get(client.client_id)
    if calibration is None:
        raise NotPermittedError(
            f"this client has not calibrated for the model of run {evaluation.run}",
            remedy="Calibrate first; a client does so by itself when it waits for work.",
        )
    if evaluation.num_examples > calibration.held_out_examples:
        raise NotPermittedError(
            f"{evaluation.num_examples} examples are reported, but this client calibrated with "
            f"{calibration.held_out_examples} held-out ones",
            remedy="Calibrate again, because the local data has changed since; then evaluate.",
        )
