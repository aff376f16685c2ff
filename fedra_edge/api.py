"""One typed method per call of the wire contract; retries follow the given policy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Final, TypeVar

from pydantic import TypeAdapter, ValidationError

from fedra_edge import transfers
from fedra_edge.errors import UnexpectedAnswerError
from fedra_edge.metering import OnBytes, OpenMeter, unmetered, unwatched
from fedra_edge.protocol import routes
from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.devices import Calibration
from fedra_edge.protocol.ids import AssignmentId, ModelId, UploadId
from fedra_edge.protocol.messages import (
    ClientStatus,
    DeltaReceipt,
    EnrolReceipt,
    EnrolRequest,
    FailureReport,
    Health,
    Heartbeat,
    HeartbeatReceipt,
    RejoinRequest,
)
from fedra_edge.protocol.models import BlobRef, ModelSpec
from fedra_edge.protocol.rounds import Assignment, Evaluation
from fedra_edge.protocol.trust import Authority, KeyChange
from fedra_edge.protocol.wire import WireModel
from fedra_edge.retrying import FOR_EVER, ONCE, Retrier, RetryPolicy
from fedra_edge.transport import Request, Transport, json_request

_ASSIGNMENT: Final[TypeAdapter[Assignment]] = TypeAdapter(Assignment)
_MAX_DETAIL: Final = 4000
_MAX_AUTHORITY_BYTES: Final = 65_536
_MAX_AUTHORITY_S: Final = 30.0
"""Whoever answers may be anybody, and gets no more of our memory and time than this."""

Answer = TypeVar("Answer", bound=WireModel)
Result = TypeVar("Result")


class ServerApi:
    """The server, as this client sees it.

    Every method may raise what ``Transport`` raises. An unreachable server is tried again as
    ``policy`` says, but heartbeats and farewells are sent once. ``meter`` watches deltas go out.
    """

    def __init__(
        self,
        transport: Transport,
        retrier: Retrier,
        policy: RetryPolicy = FOR_EVER,
        meter: OpenMeter = unmetered,
    ) -> None:
        self._transport = transport
        self._retrier = retrier
        self._policy = policy
        self._meter = meter

    def retried(self, operation: Callable[[], Result]) -> Result:
        """Do something that takes several calls, again and again while the server is not there."""
        return self._retrier.run(operation, self._policy)

    def health(self) -> Health:
        """Ask whether the server can serve."""
        request = Request(routes.READY, routes.READY.path, is_anonymous=True)
        return self.retried(lambda: self._transport.ask(request, Health))

    def authority(self) -> Authority:
        """Ask once for the server's certificate authority; nothing is told by that."""
        request = Request(
            routes.AUTHORITY,
            routes.AUTHORITY.path,
            is_anonymous=True,
            most_answered_bytes=_MAX_AUTHORITY_BYTES,
        )
        with self._transport.ending_after(_MAX_AUTHORITY_S):
            return self._transport.ask(request, Authority)

    def enrol(self, request: EnrolRequest) -> EnrolReceipt:
        """Become a member; repeating it with the same key changes nothing."""
        asked = json_request(routes.ENROL, routes.ENROL.path, request, is_anonymous=True)
        return self.retried(lambda: self._transport.ask(asked, EnrolReceipt))

    def change_key(self, change: KeyChange) -> None:
        """Put another key in the place of this client's own; repeating it changes nothing."""
        self._tell(routes.CHANGE_KEY, body=change)

    def rejoin(self, request: RejoinRequest) -> ClientStatus:
        """Say that an enrolled client is back."""
        return self._ask(routes.REJOIN, ClientStatus, body=request)

    def client_status(self) -> ClientStatus:
        """Ask what the server knows of this client."""
        return self._ask(routes.CLIENT_STATUS, ClientStatus)

    def leave(self) -> None:
        """Give up the membership."""
        self._tell(routes.LEAVE)

    def offline(self) -> None:
        """Say that this client goes away for now; nobody waits for its open assignment."""
        self._tell(routes.OFFLINE, policy=ONCE)

    def heartbeat(self, heartbeat: Heartbeat) -> HeartbeatReceipt:
        """Say how far the work is and hear whether it is still wanted."""
        return self._ask(routes.HEARTBEAT, HeartbeatReceipt, body=heartbeat, policy=ONCE)

    def calibrate(self, calibration: Calibration) -> None:
        """Tell what a block of a model costs on this machine."""
        self._tell(routes.CALIBRATE, body=calibration)

    def assignment(self, wait_s: float) -> Assignment:
        """Ask what to do; the server may take ``wait_s`` to answer.

        After a failed attempt the server is asked to answer at once, so that it shows that the
        connection is back.
        """
        waits = chain([wait_s], repeat(0.0))
        return self._retrier.run(lambda: self._poll(next(waits)), self._policy)

    def report_failure(self, assignment_id: AssignmentId, detail: str) -> None:
        """Say that an assignment cannot be finished, so that the round does not wait for it."""
        path = routes.FAILURE.fill(assignment_id=assignment_id)
        self._tell(routes.FAILURE, path=path, body=FailureReport(detail=detail[:_MAX_DETAIL]))

    def model(self, model_id: ModelId) -> ModelSpec:
        """Fetch a model's description and check that it is the one that was asked for."""
        spec = self._ask(routes.MODEL, ModelSpec, path=routes.MODEL.fill(model_id=model_id))
        if spec.model_id != model_id:
            raise UnexpectedAnswerError(
                f"the server's model {spec.name!r} does not have the id that was asked for",
                remedy="install the client version that belongs to this server",
            )
        return spec

    def send_evaluation(self, evaluation: Evaluation) -> None:
        """Tell the counts of this client on a revision; repeating it changes nothing."""
        self._tell(routes.EVALUATION, body=evaluation)

    def download_blob(self, ref: BlobRef, part: Path, on_bytes: OnBytes = unwatched) -> str:
        """Bring a blob into ``part``, going on behind what is there already; give the digest."""
        request = Request(routes.BLOB, routes.BLOB.fill(sha256=ref.sha256))
        download = transfers.Download(self._transport, request, part, ref.size_bytes, on_bytes)
        return self._retrier.run(download.complete, self._policy)

    def upload_offset(self, upload_id: UploadId) -> int:
        """Ask how many bytes of an upload the server holds."""
        return self._retrier.run(
            lambda: transfers.upload_offset(self._transport, upload_id), self._policy
        )

    def send_delta(
        self,
        manifest: DeltaManifest,
        file: Path,
        policy: RetryPolicy | None = None,
        *,
        is_new: bool = False,
    ) -> DeltaReceipt:
        """Bring a delta to the server, going on where an earlier attempt stopped."""
        on_bytes = self._meter(manifest.size_bytes)
        upload = transfers.Upload(self._transport, manifest, file, on_bytes, is_new=is_new)
        return self._retrier.run(upload.complete, policy or self._policy)

    def _poll(self, wait_s: float) -> Assignment:
        route = routes.ASSIGNMENT
        request = Request(route, route.path, query={"wait_s": wait_s}, wait_s=wait_s)
        content = self._transport.send(request).content
        try:
            return _ASSIGNMENT.validate_json(content)
        except ValidationError as error:
            raise UnexpectedAnswerError(
                "the server's answer is no assignment",
                remedy="install the client version that belongs to this server",
            ) from error

    def _ask(
        self,
        route: routes.Route,
        answer: type[Answer],
        *,
        path: str | None = None,
        body: WireModel | None = None,
        policy: RetryPolicy | None = None,
    ) -> Answer:
        request = json_request(route, path or route.path, body)
        return self._retrier.run(
            lambda: self._transport.ask(request, answer), policy or self._policy
        )

    def _tell(
        self,
        route: routes.Route,
        *,
        path: str | None = None,
        body: WireModel | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        request = json_request(route, path or route.path, body)
        self._retrier.run(lambda: self._transport.send(request), policy or self._policy)
