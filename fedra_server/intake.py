"""Takes deltas in: refuses what must not enter, and makes durable what may be merged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from fedra_edge.protocol.deltas import DeltaManifest
from fedra_edge.protocol.fault_points import fault_point
from fedra_edge.protocol.files import sha256_of_file
from fedra_edge.protocol.ids import ClientId, RunId
from fedra_edge.protocol.messages import DeltaReceipt
from fedra_edge.protocol.models import Shape
from fedra_edge.protocol.problems import ProblemCode
from fedra_server.admission import check_delta, largest_delta_bytes
from fedra_server.clock import Clock
from fedra_server.config import ServerConfig
from fedra_server.errors import FedraServerError, NotPermittedError, RefusedError
from fedra_server.plausibility import find_implausible
from fedra_server.publishing import trained_pieces
from fedra_server.rounds import staleness
from fedra_server.run_locks import RunLocks
from fedra_server.runs import AssignmentState, RunState
from fedra_server.storage.delta_files import DeltaFiles
from fedra_server.storage.durability import disk_errors, replace_durably
from fedra_server.storage.records import AssignmentRecord, UploadRecord
from fedra_server.storage.store import Store
from fedra_server.storage.tokens import require_member

LOGGER = logging.getLogger(__name__)
_COUNTED: Final = frozenset(
    {
        AssignmentState.ADMITTED,
        AssignmentState.MERGED,
        AssignmentState.QUARANTINED,
        AssignmentState.DISCARDED,
    }
)
_OPEN: Final = frozenset({AssignmentState.PENDING, AssignmentState.FAILED, AssignmentState.EXPIRED})
_DEFECT: Final = "Update the client software; if it is up to date, report this as a defect."


class Intake:
    """The way of a delta from its announcement to being counted in.

    The lock of a run is held while a delta is counted in and while a merge is made after which
    none may be left, so that a delta is either part of that merge or refused. A delta whose round
    is over is taken while none of its pieces is staler than the run allows.
    """

    def __init__(
        self,
        store: Store,
        deltas: DeltaFiles,
        config: ServerConfig,
        clock: Clock,
        locks: RunLocks,
    ) -> None:
        self._store = store
        self._deltas = deltas
        self._config = config
        self._clock = clock
        self._locks = locks

    def expect(self, client_id: ClientId, delta: DeltaManifest) -> AssignmentRecord:
        """Check an announced delta before a byte of it is accepted.

        Raises:
            NotFoundError: There is no such assignment.
            NotPermittedError: It is another client's.
            RefusedError: It is too stale, another delta was admitted, or it is too large.
        """
        assignment = self._store.assignment(delta.id)
        if assignment.client_id != client_id:
            raise NotPermittedError(
                f"assignment {delta.id} belongs to another client",
                remedy="Use each client's home directory on one machine only.",
            )
        self._refuse_unless_welcome(assignment, delta)
        limit = largest_delta_bytes(self._shapes(assignment))
        if self._config.max_delta_bytes is not None:
            limit = min(limit, self._config.max_delta_bytes)
        if delta.size_bytes > limit and not self.is_counted(assignment):
            error = RefusedError(
                ProblemCode.DELTA_TOO_LARGE,
                f"{delta.size_bytes} bytes announced, this slice's delta has at most {limit}",
                remedy="Raise max_delta_bytes of the server, or update the client software.",
            )
            self._refuse(assignment, error)
            raise error
        return assignment

    def hear(self, client_id: ClientId, delta: DeltaManifest) -> AssignmentRecord:
        """Check an announcement: the delta as ever, and what else is said of it, this once.

        Raises:
            RefusedError: As ``expect``, or more examples are claimed than can have been drawn.
        """
        assignment = self.expect(client_id, delta)
        if not self.is_counted(assignment):
            work = assignment.manifest
            calibration = self._store.calibration(client_id, work.model_id)
            error = find_implausible(delta, work, calibration)
            if error is not None:
                self._refuse(assignment, error)
                raise error
        return assignment

    def is_counted(self, assignment: AssignmentRecord) -> bool:
        """Tell whether the assignment's delta is already in; sending it again changes nothing."""
        return assignment.state in _COUNTED

    def admit(self, upload: UploadRecord, part: Path) -> DeltaReceipt:
        """Check a complete upload and count it in."""
        self.check(upload, part)
        return self.count_in(upload, part)

    def check(self, upload: UploadRecord, part: Path, sha256: str | None = None) -> RunId:
        """Check the bytes of a complete upload, unless its delta is settled; tell its run.

        Args:
            upload: What was announced.
            part: The bytes that came.
            sha256: Their digest, if they were digested as they came.

        Raises:
            RefusedError: The delta breaks a rule.
            StorageError: It could not be read; nothing changed.
        """
        assignment = self._store.assignment(upload.assignment_id)
        if assignment.state in _OPEN:
            self._check(assignment, upload, part, sha256)
            fault_point("admission.checked")
        return assignment.run

    def count_in(self, upload: UploadRecord, part: Path) -> DeltaReceipt:
        """Make a checked upload durable and count it in, holding the run's lock. Idempotent.

        Raises:
            RefusedError: The delta is too stale by now.
            StorageError: It could not be kept; nothing changed.
        """
        assignment = self._store.assignment(upload.assignment_id)
        receipt = DeltaReceipt(assignment_id=assignment.assignment_id)
        with self._locks.of(assignment.run):
            with self._store.reading():
                assignment = self._store.assignment(assignment.assignment_id)
                lateness = self._refuse_unless_welcome(assignment, upload.delta)
            if self.is_counted(assignment):
                return receipt
            self._release_others(assignment)
            try:
                self._keep(assignment, upload, part)
            except FedraServerError:
                self._put_back(assignment, part)
                raise
        return receipt.model_copy(update={"staleness": lateness})

    def _keep(self, assignment: AssignmentRecord, upload: UploadRecord, part: Path) -> None:
        with disk_errors("keeping an admitted delta"):
            self._deltas.keep(part, assignment.assignment_id, upload.delta.sha256)
        fault_point("admission.moved")
        self._store.settle(
            assignment.assignment_id,
            AssignmentState.ADMITTED,
            detail="",
            now=self._clock.now(),
            delta=upload.delta,
            only_from=_OPEN,
        )
        fault_point("admission.recorded")

    def _put_back(self, assignment: AssignmentRecord, part: Path) -> None:
        """Let a delta that was moved and not recorded be an upload again, as far as it got."""
        try:
            is_open = self._store.assignment(assignment.assignment_id).state in _OPEN
            if is_open and not part.exists():
                with disk_errors("putting back a delta that could not be recorded"):
                    replace_durably(self._deltas.path(assignment.assignment_id), part)
        except FedraServerError as error:
            LOGGER.warning("delta %s must be sent again: %s", assignment.assignment_id, error)

    def _check(
        self, assignment: AssignmentRecord, upload: UploadRecord, part: Path, sha256: str | None
    ) -> None:
        """Run admission; a delta that fails it settles its assignment as refused."""
        with disk_errors("reading a received delta"):
            sha256 = sha256 or sha256_of_file(part)
        if sha256 != upload.delta.sha256:
            raise RefusedError(
                ProblemCode.DIGEST_MISMATCH,
                "the bytes received do not have the announced sha256",
                remedy="Send the delta again; the link or a disk altered it on the way.",
            )
        try:
            check_delta(part, self._shapes(assignment))
        except RefusedError as error:
            self._refuse(assignment, error, upload.delta)
            raise

    def _refuse(
        self, assignment: AssignmentRecord, error: RefusedError, delta: DeltaManifest | None = None
    ) -> None:
        """Settle an assignment, so that its round does not wait for it and the operator sees.

        The ``delta`` is given where it was received.
        """
        LOGGER.warning("delta of client %s refused: %s", assignment.client_id, error)
        self._store.settle(
            assignment.assignment_id,
            AssignmentState.REFUSED,
            detail=f"{error.code}: {error}",
            now=self._clock.now(),
            delta=delta,
            only_from=_OPEN,
        )

    def _others(self, assignment: AssignmentRecord) -> list[AssignmentRecord]:
        """Give what else the same client was assigned in the same round, after a failure.

        A buffered run has no such rule: there a quick client delivers as often as it can.
        """
        if self._store.run(assignment.run).spec.mode == "buffered":
            return []
        return [
            other
            for other in self._store.assignments_of(
                assignment.client_id, assignment.run, assignment.round_number
            )
            if other.assignment_id != assignment.assignment_id
        ]

    def _release_others(self, assignment: AssignmentRecord) -> None:
        """Let a client contribute to a round once: its other work there is not awaited."""
        for other in self._others(assignment):
            if other.state is AssignmentState.PENDING:
                self._store.settle(
                    other.assignment_id,
                    AssignmentState.EXPIRED,
                    detail="the client delivered an earlier assignment of this round",
                    now=self._clock.now(),
                )

    def _refuse_unless_welcome(
        self, assignment: AssignmentRecord, delta: DeltaManifest
    ) -> int | None:
        """Let pass what a member sends and may be merged, and a repeat of what is counted.

        Returns:
            How stale a delta is that comes after its round; None when it is not late.
        """
        require_member(self._store.client(assignment.client_id))
        if self.is_counted(assignment):
            if assignment.delta is not None and assignment.delta.sha256 == delta.sha256:
                return None
            raise RefusedError(
                ProblemCode.DELTA_CONFLICT,
                "another delta of this assignment was admitted before",
                remedy="Use each client's home directory on one machine only.",
            )
        if any(self.is_counted(other) for other in self._others(assignment)):
            raise RefusedError(
                ProblemCode.DELTA_CONFLICT,
                "this client's delta of another assignment of the round was admitted before",
                remedy="Nothing to do; a client contributes to a round once.",
            )
        if assignment.state is AssignmentState.REFUSED:
            raise RefusedError(
                ProblemCode.DELTA_CONFLICT,
                f"this assignment's delta was refused before: {assignment.detail}",
                remedy="Nothing to do; the client gets a new assignment in the next round.",
            )
        return self._refuse_when_over(assignment)

    def _refuse_when_over(self, assignment: AssignmentRecord) -> int | None:
        """Let pass a delta of a run that goes on, unless one of its pieces is too stale."""
        run = self._store.run(assignment.run)
        ended = f"round {assignment.round_number} of run {run.run} ended without this delta"
        if run.state not in {RunState.RUNNING, RunState.PAUSED}:
            raise RefusedError(
                ProblemCode.ROUND_CLOSED,
                f"{ended}: the run is {run.state}",
                remedy="Nothing to do; a run that is over takes no deltas.",
            )
        latest = self._store.revision(run.run)
        base = self._store.revision(run.run, assignment.manifest.revision.number)
        pieces = trained_pieces(assignment.manifest.trained_layer_ids)
        stale = staleness(pieces, base.version_by_piece, latest.version_by_piece)
        piece = max(pieces, key=stale.__getitem__)
        if stale[piece] > run.spec.staleness_limit:
            raise RefusedError(
                ProblemCode.ROUND_CLOSED,
                f"{ended}: {piece} was merged {stale[piece]} times since revision "
                f"{base.manifest.number}, and the run takes a staleness of at most "
                f"{run.spec.staleness_limit}",
                remedy="Nothing to do here; a longer --deadline-s or a larger --max-staleness of "
                "the run would let slow sites count.",
            )
        is_on_time = latest.manifest.number < assignment.round_number
        return None if is_on_time else stale[piece]

    def _shapes(self, assignment: AssignmentRecord) -> dict[str, Shape]:
        spec = self._store.model(self._store.run(assignment.run).model_id).spec
        manifest = assignment.manifest
        return spec.delta_shapes(manifest.adapter, manifest.trained_layer_ids)
